"""A host's journal as SQLite would keep it: conditional transitions, one holder, and what was not synced is lost.

Rule 1: a transition is first written, then synced; only then it is durable. A process that dies between the two
        leaves the journal as it was before.
Rule 2: one process at a time holds it. The holder's death frees it; a holder that hangs does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.sim.errors import JournalFull, JournalRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from migration.identity import AttemptKey

FINAL_STATES = frozenset({"ABORTED", "COMPLETED", "COMMITTED"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt, as recorded."""

    key: AttemptKey
    role: str
    state: str
    digest: int | None = None
    detail: str = ""


class SimJournal:
    """One host's file. `reach` is told between writing and syncing, where a process may die."""

    def __init__(self, reach: Callable[[str], object]) -> None:
        self.holder: object = None
        self.full = False  # it takes nothing from the destination's role
        self.written_when_full: Callable[[], bool] = lambda: False  # whether a write that failed is there
        self._reach = reach
        self._rows: dict[tuple[AttemptKey, str], Entry] = {}
        self._durable: dict[tuple[AttemptKey, str], Entry] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def begin(self, key: AttemptKey, role: str, state: str, *, detail: str = "") -> None:
        """Record a new attempt."""
        for entry in self._rows.values():
            if (entry.key.migration, entry.key.attempt, entry.role) == (key.migration, key.attempt, role):
                raise JournalRefused(f"cannot begin {role} attempt {key}: found {entry.state}")
        self._put(Entry(key, role, state, None, detail), sync=True)

    def move(
        self,
        key: AttemptKey,
        role: str,
        expected: Collection[str],
        to: str,
        *,
        digest: int | None = None,
        detail: str = "",
        sync: bool = True,
    ) -> None:
        """Enter state `to` if the attempt is in one of `expected`."""
        found = self._rows.get((key, role))
        if found is None or found.state not in expected:
            told = "nothing" if found is None else found.state
            raise JournalRefused(f"cannot move {role} attempt {key} to {to}: found {told}")
        self._put(Entry(key, role, to, found.digest if digest is None else digest, detail), sync=sync)

    def get(self, key: AttemptKey, role: str) -> Entry | None:
        """The entry of exactly this attempt."""
        return self._rows.get((key, role))

    def entries(self, role: str) -> list[Entry]:
        """All of a role, oldest first."""
        return [entry for entry in self._rows.values() if entry.role == role]

    def newest(self, role: str) -> Entry | None:
        """The entry that was begun last in this role."""
        return next((entry for entry in reversed(self._rows.values()) if entry.role == role), None)

    def unfinished(self, role: str) -> list[Entry]:
        """Entries in no final state, oldest first."""
        rows = self._rows.values()
        return [entry for entry in rows if entry.role == role and entry.state not in FINAL_STATES]

    def forget(self, key: AttemptKey, role: str) -> None:
        """Remove the attempt."""
        self._rows.pop((key, role), None)
        self._durable = dict(self._rows)

    def lose_unsynced(self) -> None:
        """Its holder died."""
        self._rows = dict(self._durable)

    def _put(self, entry: Entry, *, sync: bool) -> None:
        # A source without a journal ends its attempt: that is tested live.
        if self.full and entry.role == "dest":
            if self.written_when_full():
                self._rows[entry.key, entry.role] = entry
                self._durable = dict(self._rows)
            raise JournalFull("database or disk is full")
        self._rows[entry.key, entry.role] = entry
        self._reach(f"{entry.role}.{entry.state}.written")
        if sync:
            self._durable = dict(self._rows)
        self._reach(f"{entry.role}.{entry.state}.recorded")
