"""What must come of a crash at every point of the protocol, as data: docs/safety.md shows it, cells obey it.

Rule 1: a cell is a point and a crash. The node that reaches the point stands there until the crash is in force;
        what was killed is started again first, and a cut link is healed once the source has noticed.
Rule 2: until COMMITTING is recorded every crash leads back to the source; from then on the destination's journal
        alone decides, and what it had not recorded is ABORTED.
Rule 3: a guest is lost where the process died that alone could run it: the source's until the destination has the
        whole image and the source can no longer turn back, the destination's after COMMITTED.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from host.points import DEST_POINTS, SOURCE_POINTS, side_of
from testbed.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from testbed.history import Origin

Crash: TypeAlias = Literal["source", "dest", "guest", "link", "both"]
Outcome: TypeAlias = Literal["completed", "cancelled", "failed", "guest_lost"]

CRASHES: Final[dict[Crash, str]] = {
    "source": "the source's node is killed",
    "dest": "the destination's node is killed",
    "guest": "the process that runs the guest is killed",
    "link": "the link is cut",
    "both": "both nodes are killed",
}
_BACK: Final[tuple[Outcome, ...]] = ("failed", "failed", "guest_lost", "failed", "failed")
_ASKED: Final[tuple[Outcome, ...]] = ("completed", "failed", "completed", "completed", "failed")
_GIVEN: Final[tuple[Outcome, ...]] = ("completed", "completed", "guest_lost", "completed", "completed")

# In the order of the protocol; per crash, in the order of CRASHES.
OUTCOMES: Final[dict[str, tuple[Outcome, ...]]] = {
    # A destination that comes back before it was asked has lost nothing.
    "started.recorded": ("failed", "completed", "guest_lost", "failed", "failed"),
    "open.sent": _BACK,
    "receiving.recorded": _BACK,
    "hint.open": _BACK,
    "round 1": _BACK,
    "round 1 50%": _BACK,
    "round 2": _BACK,
    "stop_copy": _BACK,
    "last_harvest": _BACK,
    "saved": _BACK,
    "prepare.sent": _BACK,
    "prepare.received": _BACK,
    "prepared.recorded": _BACK,
    "committing.recorded": _ASKED,
    "commit.sent": _ASKED,
    "commit.received": _ASKED,
    "committed.recorded": _GIVEN,
    "guest.run": _GIVEN,
    "completed.recorded": _GIVEN,
    # Reached by cancelling while the guest stands still; a source that was killed can only say that it was aborted.
    "aborted.recorded": ("failed", "cancelled", "guest_lost", "cancelled", "failed"),
}
assert set(SOURCE_POINTS) | set(DEST_POINTS) <= set(OUTCOMES), "every point has its row"
# The message is on its way: the destination stands where it has heard it and has done nothing about it.
HEARD_AT: Final = {
    "open.sent": "receiving.recorded",
    "prepare.sent": "prepare.received",
    "commit.sent": "commit.received",
}
CANCELLED_AT: Final = {"aborted.recorded": "last_harvest"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One crash at one point."""

    point: str
    crash: Crash

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return f"{self.point}/{self.crash}"

    @property
    def outcome(self) -> Outcome:
        """What must come of it."""
        return OUTCOMES[self.point][list(CRASHES).index(self.crash)]

    @property
    def side(self) -> Origin:
        """Whose node reaches the point."""
        return "source" if side_of(self.point) == "source" else "dest"

    @property
    def nodes_killed(self) -> tuple[Origin, ...]:
        """Whose nodes die."""
        killed: dict[Crash, tuple[Origin, ...]] = {
            "source": ("source",), "dest": ("dest",), "both": ("source", "dest"),
        }  # fmt: skip
        return killed.get(self.crash, ())

    @property
    def guest_host(self) -> Origin:
        """Where the process is that runs the guest, or may alone run it again, at the point."""
        return "dest" if OUTCOMES[self.point] is _GIVEN else "source"


CELLS: Final = tuple(Cell(point, crash) for point in OUTCOMES for crash in CRASHES)


def cell_named(name: str) -> Cell:
    """Raises UsageError where there is none."""
    found = {cell.name: cell for cell in CELLS}
    if name not in found:
        raise UsageError(
            f"there is no crash {name!r}: `ballast soak --cell list` names them{did_you_mean(name, found)}"
        )
    return found[name]


def as_markdown() -> list[str]:
    """The table of docs/safety.md."""
    where = {**SOURCE_POINTS, **DEST_POINTS}
    lines = [
        f"| at | node | then | {' | '.join(CRASHES)} |",
        f"|---|---|---|{'---|' * len(CRASHES)}",
    ]
    for point, outcomes in OUTCOMES.items():
        side = "source" if side_of(point) == "source" else "destination"
        told = where.get(point, "pages are being sent while the guest runs")
        lines.append(f"| `{point}` | {side} | {told} | {' | '.join(outcomes)} |")
    return lines
