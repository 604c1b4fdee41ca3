"""The attempts of one leg: when another one follows, how long it waits, and a wish to cancel that comes in between.

Rule 1: another attempt follows only where it may go better (analysis/decided.py), after a pause that doubles: a
        destination whose node or agent is being started again needs seconds, which a budget is to outlast.
Rule 2: the pause is one line of the history; Ctrl-C and a wish to cancel end it.
Rule 3: a wish to cancel is for the leg, not for the attempt that it meets: no attempt follows it. One that comes
        between two is effective, and one that meets an attempt being asked for is passed on to it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

from testbed.analysis.decided import worth_another_attempt
from testbed.errors import RunBrokenError

if TYPE_CHECKING:
    from testbed.history import Event, History
    from testbed.node_client import NodeClient
    from testbed.scenario.migration_keys import Migration

RETRY_PAUSE_MS_MAX: Final = 30_000  # a host that is away for longer is not waited for in ever longer steps
BETWEEN: Final = "BETWEEN_ATTEMPTS"  # where other wishes have the phase of the source's machine
_ENDS_PAUSE: Final = ("interrupted", "cancel_asked")


def retry_pause_ms(first_ms: int, attempt: int) -> int:
    """How long the attempt after this one waits, in ms; attempts count from 1."""
    return min(
        first_ms << min(attempt - 1, RETRY_PAUSE_MS_MAX.bit_length()), max(first_ms, RETRY_PAUSE_MS_MAX)
    )


class Attempts:
    """Of the leg under way. `cancel` may be called by any thread."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._lock = threading.Lock()
        self._leg_under_way = self._at_the_source = False
        self._wish = ""

    def begin(self) -> None:
        """A leg's first attempt follows."""
        with self._lock:
            self._leg_under_way, self._at_the_source, self._wish = True, False, ""

    def requested(self, source: NodeClient) -> None:
        """The source has taken an attempt up. Raises RunBrokenError."""
        with self._lock:
            self._at_the_source, wish = True, self._wish
        if wish:
            self.cancel(source, wish)

    def another_follows(self, leg: Migration, attempt: int, ended: Event) -> bool:
        """Whether there is one after this attempt, which `ended`; returns when it is to begin."""
        with self._lock:
            self._at_the_source = False
            goes_on = attempt <= leg.retries and worth_another_attempt(ended) and not self._wish
            self._leg_under_way = goes_on
        if not goes_on:
            return False
        pause_ms, reason = retry_pause_ms(leg.retry_pause, attempt), ended.fields["reason"]
        told = self._history.note("migration_retried", attempt=attempt + 1, reason=reason, pause_ms=pause_ms)
        self._history.wait_for(
            lambda event: event.name in _ENDS_PAUSE and event.at_ns >= told.at_ns, pause_ms / 1000
        )
        with self._lock:
            self._leg_under_way = not self._wish
            return self._leg_under_way

    def cancel(self, source: NodeClient, reason: str) -> dict[str, Any]:
        """Asks for the end of the leg; `effective` and `phase` as the source answers.

        Raises:
            RunBrokenError: no migration is under way, or its source does not answer.
        """
        with self._lock:
            self._wish = reason
        try:
            reply = source.cancel(reason)
        except RunBrokenError:
            with self._lock:
                if self._at_the_source or not self._leg_under_way:
                    raise
            answer = {"effective": True, "phase": BETWEEN}
        else:
            answer = {"effective": reply.effective, "phase": reply.phase}
        self._history.note("cancel_asked", reason=reason, **answer)
        return answer
