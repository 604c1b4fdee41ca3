"""Which command of the destination machine reaches which point (host/points.py), as data.

Rule 1: BEFORE is looked at before a command is carried out, AFTER when it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from migration import commands as do
from migration.events import Recorded

if TYPE_CHECKING:
    from host.points import Points

BEFORE: Final[dict[type[do.DestCommand], str]] = {
    do.VerifyImage: "prepare.received",
    do.ConfirmGuest: "commit.received",
}
AFTER: Final[dict[type[do.DestCommand], str]] = {do.RunGuest: "guest.run"}
RECORDED: Final[dict[Recorded, str]] = {
    Recorded.RECEIVING: "receiving.recorded",
    Recorded.PREPARED: "prepared.recorded",
    Recorded.COMMITTED: "committed.recorded",
}


def reach_before(points: Points, command: do.DestCommand) -> None:
    """Called with every command before it is carried out."""
    if (point := BEFORE.get(type(command))) is not None:
        points.reach(point)


def reach_after(points: Points, command: do.DestCommand) -> None:
    """Called with every command that was carried out."""
    recorded = RECORDED.get(command.state) if isinstance(command, do.RecordState) else None
    if (point := recorded or AFTER.get(type(command))) is not None:
        points.reach(point)
