"""Attempts that are not at hand any more: what the journal of this destination still says of them.

Rule 1: a process that was started again has not asked its agent yet. Until it has brought the guest to where the
        journal says, COMMITTED is no answer: the guest may not run, and a source that hears it lets go of its own.
Rule 2: until then nothing is forgotten either: the journal is all that says what the agent's image is.
Rule 3: an image is thrown away only where the journal proves that its attempt was aborted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.errors import HostError
from migration.commands import Reply
from migration.events import Answer

if TYPE_CHECKING:
    from host.journal import Journal
    from migration.identity import AttemptKey

OUTCOMES_MAX = 10_000  # attempts that no source has said Forget of: they are kept, so there must be an end
NOT_YET = (
    "committed, and the guest does not run yet: this host has not found its guest agent since it started"
)


class IntakeRefused(HostError):
    """This host cannot take the guest in, or cannot do so now; the message says why."""


class Outcomes:
    """Not thread-safe: under the lock of the intake."""

    def __init__(self, journal: Journal, host_name: str) -> None:
        self._journal = journal
        self._host_name = host_name
        self._guest_recovered = False

    def guest_recovered(self) -> None:
        """What the agent holds is where the journal says it must be."""
        self._guest_recovered = True

    def answer(self, key: AttemptKey) -> Reply | None:
        """How it ended; None when nothing of it is recorded, or nothing final."""
        entry = self._journal.get(key, "dest")
        if entry is None or entry.state not in ("ABORTED", "COMMITTED"):
            return None
        if entry.state == "COMMITTED" and not self._guest_recovered:
            return Reply(Answer.UNKNOWN, NOT_YET)
        return Reply(Answer[entry.state], entry.detail)

    def forget(self, key: AttemptKey) -> None:
        """Its source knows.

        Raises:
            IntakeRefused: it is still needed, see Rule 2.
        """
        if self.answer(key) is None:
            return
        if not self._guest_recovered:
            raise IntakeRefused(f"attempt {key} is still needed here: say Forget again later")
        self._journal.forget(key, "dest")

    def check_new(self, key: AttemptKey) -> None:
        """Whether such an attempt may begin. Raises IntakeRefused."""
        if (entry := self._journal.get_any_epoch(key, "dest")) is not None:
            raise IntakeRefused(f"attempt {entry.key} was {entry.state} here before")
        if self._journal.count("dest") >= OUTCOMES_MAX:
            raise IntakeRefused(
                f"host {self._host_name} keeps the outcomes of {OUTCOMES_MAX} attempts: "
                "their sources have to say Forget before another one comes"
            )
