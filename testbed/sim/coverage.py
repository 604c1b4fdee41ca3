"""How often every transition, fault and point was reached over all worlds of a run, and what never was.

Rule 1: the universe is made from the machines' own tables and from the kinds of faults. Listed by hand are
        outcomes, and what ballooned pages go through, which no table says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from migration import dest_phases, source_phases
from testbed.sim.options import KINDS
from testbed.sim.points import POINTS

if TYPE_CHECKING:
    from collections.abc import Mapping

OUTCOMES = ("completed", "rehearsal", "cancelled", "failed")
BALLOON = (
    "left out of round 1",
    "left out of a later round",
    "left out of the last round",
    "written before the host was told",
    "deflated, and not yet taken out, at the hand-over",
    "given back by the next host",
    "known to the next host",
)
MESSAGES = tuple(f"{word} a message" for word in ("lose", "duplicate", "delay", "reorder"))


def universe() -> dict[str, list[str]]:
    """Everything that worlds should reach, by group."""
    return {
        "source_transitions": _transitions(source_phases.TRANSITIONS),
        "dest_transitions": _transitions(dest_phases.TRANSITIONS),
        "points": list(POINTS),
        "faults": [*KINDS, *MESSAGES, "second process refused"],
        "balloon": list(BALLOON),
        "outcomes": list(OUTCOMES),
    }


PREFIXES = {
    "source_transitions": "source ",
    "dest_transitions": "dest ",
    "points": "point ",
    "faults": "fault ",
    "balloon": "balloon ",
    "outcomes": "outcome ",
}


def grouped(counted: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The counts of a run by group, the unreached ones as 0."""
    return {
        group: {name: counted.get(PREFIXES[group] + name, 0) for name in names}
        for group, names in universe().items()
    }


def unreached(groups: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What was never reached, as "group: name"."""
    return [
        f"{group}: {name}" for group, names in groups.items() for name, count in names.items() if not count
    ]


def _transitions(table: Mapping[Any, Mapping[Any, frozenset[Any]]]) -> list[str]:
    return sorted(
        f"{phase.name} {event.__name__} {target.name}"
        for phase, events in table.items()
        for event, targets in events.items()
        for target in targets
    )
