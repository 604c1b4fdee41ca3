"""Why an attempt turns back, and what is left to do at the source once ABORTED is recorded and the guest runs.

Rule 1: pure functions over facts; the machine in source_machine.py decides when they are asked.
Rule 2: however an attempt ends here, a guest that was asked for hints is told DONE, and the destination is told:
        Abort, or Forget after a rehearsal, which it aborted itself before it answered VERIFIED.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migration import commands as do
from migration import events as told
from migration.commands import Cause
from migration.source_phases import SourcePhase

if TYPE_CHECKING:
    from migration.identity import AttemptKey
    from migration.link_recovery import LinkRecovery


@dataclass(frozen=True, slots=True)
class Turn:
    """How an attempt ends that turned back: the final phase, why in one sentence, and what made it."""

    phase: SourcePhase
    reason: str
    cause: Cause

    @property
    def decision(self) -> str:
        """As the history calls it."""
        return "turn_back" if self.phase is SourcePhase.REHEARSED else "cancel"

    def but(self, event: told.SourceEvent) -> Turn:
        """The same, unless the guest could not be resumed either."""
        if not isinstance(event, told.HostFailed):
            return self
        reason = f"{self.reason}; and the guest could not be resumed: {event.reason}"
        return Turn(SourcePhase.FAILED, reason, Cause.HOST)

    def ending(self, key: AttemptKey, *, hints_ordered: bool) -> list[do.SourceCommand]:
        """The last orders of the attempt."""
        hints: list[do.SourceCommand] = [do.EndHints()] if hints_ordered else []
        if self.phase is SourcePhase.REHEARSED:
            return [*hints, do.ForgetDestination(key), do.EndMigration("rehearsal", self.reason)]
        outcome = "cancelled" if self.phase is SourcePhase.CANCELLED else "failed"
        return [
            *hints,
            do.AbortDestination(key, self.reason),
            do.EndMigration(outcome, self.reason, self.cause),
        ]


def turn_of(event: told.SourceEvent, link: LinkRecovery) -> Turn | None:
    """The end that this fact means in every reversible phase, or None when it means none."""
    match event:
        case told.TimerFired(told.Timer.LINK):
            return Turn(SourcePhase.CANCELLED, link.given_up(), Cause.LINK)
        case told.CancelRequested(reason):
            return Turn(SourcePhase.CANCELLED, reason, Cause.REQUEST)
        case told.PeerLost(reason):
            return Turn(SourcePhase.FAILED, reason, Cause.DESTINATION)
        case told.HostFailed(reason):
            return Turn(SourcePhase.FAILED, reason, Cause.HOST)
        case _:
            return None
