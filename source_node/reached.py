"""Which command of the source machine reaches which point (host/points.py), as data.

Rule 1: BEFORE is looked at before a command is carried out, AFTER only when that succeeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from migration import commands as do
from migration.events import Recorded
from migration.source_phases import SourcePhase

if TYPE_CHECKING:
    from host.points import Points
    from migration.source_machine import SourceMachine

BEFORE: Final[dict[type[do.SourceCommand], str]] = {do.PauseGuest: "stop_copy"}
AFTER: Final[dict[type[do.SourceCommand], str]] = {
    do.OpenDestination: "open.sent",
    do.OpenHints: "hint.open",
    do.SaveGuest: "saved",
    do.SendPrepare: "prepare.sent",
    do.SendCommit: "commit.sent",
}
RECORDED: Final[dict[Recorded, str]] = {
    Recorded.STARTED: "started.recorded",
    Recorded.COMMITTING: "committing.recorded",
    Recorded.COMPLETED: "completed.recorded",
    Recorded.ABORTED: "aborted.recorded",
}


def reach_before(points: Points, command: do.SourceCommand, machine: SourceMachine) -> None:
    """Called with every command before it is carried out."""
    if isinstance(command, do.Harvest):
        if machine.phase is SourcePhase.FINAL_HARVESTING:
            points.reach("last_harvest")
    elif isinstance(command, do.SendPages | do.AwaitAcknowledgements):
        if (current := machine.round_set) is not None:
            waiting = len(command.pfns) if isinstance(command, do.SendPages) else 0
            total = max(1, current.ledger.candidate_pages)
            points.reach_round(current.index, 100.0 * (total - current.remaining - waiting) / total)
    elif (point := BEFORE.get(type(command))) is not None:
        points.reach(point)


def reach_after(points: Points, command: do.SourceCommand) -> None:
    """Called with every command that was carried out."""
    if isinstance(command, do.RecordState):
        points.reach(RECORDED[command.state])
    elif (point := AFTER.get(type(command))) is not None:
        points.reach(point)
