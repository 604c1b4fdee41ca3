"""The points of the protocol where a process may be killed, cut off or held: made from the machines' orders.

Before and after every order that does something, between writing and syncing every record, and wherever the source
enters a phase that can still turn back.
"""

from __future__ import annotations

from typing import Final, get_args

from migration import commands as do
from migration.events import Recorded
from migration.source_phases import REVERSIBLE_PHASES, SourcePhase

# Orders that only concern the shell itself.
UNSEEN: Final = frozenset({do.ArmTimer, do.DisarmTimer, do.Note, do.EndMigration})
SOURCE_STATES: Final = (Recorded.STARTED, Recorded.COMMITTING, Recorded.COMPLETED, Recorded.ABORTED)
DEST_STATES: Final = (Recorded.RECEIVING, Recorded.PREPARED, Recorded.COMMITTED, Recorded.ABORTED)


def before(role: str, command: type) -> str:
    """The point just before an order is carried out."""
    return f"{role}.{command.__name__}.before"


def after(role: str, command: type) -> str:
    """The point just after."""
    return f"{role}.{command.__name__}.after"


def phase(entered: SourcePhase) -> str:
    """The point where the source enters a phase, before the orders that belong to it."""
    return f"source.phase.{entered.name}"


PHASES: Final = tuple(
    phase(entered) for entered in SourcePhase if entered in REVERSIBLE_PHASES | {SourcePhase.RECORDING}
)


def _points() -> tuple[str, ...]:
    names: list[str] = []
    for role, union, states in (
        ("source", do.SourceCommand, SOURCE_STATES),
        ("dest", do.DestCommand, DEST_STATES),
    ):
        for command in get_args(union):
            if command not in UNSEEN:
                names += [before(role, command), after(role, command)]
        for state in states:
            names += [f"{role}.{state.value}.written", f"{role}.{state.value}.recorded"]
    return (*names, *PHASES)


POINTS: Final = _points()
# Between Prepare and the running guest a fault decides most; half of those at points come there.
DECISIVE: Final = tuple(
    point
    for point in POINTS
    if any(
        word in point
        for word in (
            "PREPARED",
            "COMMIT",
            "Commit",
            "Prepare",
            "RunGuest",
            "ConfirmGuest",
            "ABORTED",
            "ResumeGuest",
        )
    )
)
