"""What a run is doing, in a person's words, from its events.

Rule 1: a step is told when it begins. None is told twice, and none goes back, before another attempt begins: a host
        that says late that it is there does not let the guest boot again on the screen.
Rule 2: a decision is told in the words in which the history has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from testbed.host_handles import SHORT_NAMES
from testbed.units import format_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testbed.history import Event

# What is happening from this event on, in the order in which a run comes to it.
STEPS: Final = {
    "run_started": "starting two hosts",
    "image_build_started": "building the image of the hosts (once)",
    "image_built": "starting two hosts",
    "node_described": "the guest boots",
    "guest_ready": "the guest settles",
    "dirty_rate_started": "measuring how the guest writes",
    "migration_requested": "setting up",
    "migration_retried": "waiting for the next attempt",
    "hints_opened": "asking the guest for its free pages",
    "guest_paused": "switching over",
    "prepared": "the destination has the whole guest",
    "committed": "the guest runs at the destination",
    "guest_running": "the guest runs on; both memories are hashed",
    "interrupted": "cancelling (once more: hurry)",
    "guest_checked": "collecting the evidence",
    "run_broken": "taking everything down",
}
ATTEMPT_BEGINS: Final = ("migration_requested", "migration_retried")
_PLACES: Final = {name: place for place, name in enumerate(STEPS)}


def _round(said: Mapping[str, Any]) -> str:
    pages = ", ".join(f"{said[f'{kind}_pages']:,} {kind}" for kind in ("sent", "zero", "skipped"))
    return f"round {said['round']}: {pages} pages in {format_ms(said['duration_ms'])}; {said['reason']}"


# What is told beside the steps, from the fields of the event; "" where there is nothing to tell.
SENTENCES: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "image_build_step": lambda said: str(said["step"]),
    "leg_started": lambda said: (
        f"leg {said['leg']}: from host {SHORT_NAMES[said['giver']]} to {SHORT_NAMES[said['taker']]}"
    ),
    "migration_requested": lambda said: f"attempt {said['attempt']}: setting up",
    "migration_retried": lambda said: (
        f"attempt {said['attempt']} follows in {format_ms(said['pause_ms'])}: {said['reason']}"
    ),
    "round_ended": _round,
    "decision": lambda said: str(said["reason"]),
    # Both ends lose the link; the source is the one that says in which phase.
    "link_lost": lambda said: f"the link is lost: {said['reason']}" if "phase" in said else "",
    "link_restored": lambda said: (
        f"the link is back after {format_ms(said['paused_ms'])}; {said['resent_pages']:,} pages go again"
    ),
    "throttled": lambda said: (
        f"the guest is throttled by {said['percent']} %" if said["percent"] else "the throttle is lifted"
    ),
    "fault_applied": lambda said: f"fault {said['kind']} is in force at host {SHORT_NAMES[said['host']]}",
    "fault_healed": lambda said: f"fault {said['kind']} is healed: {said['why']}",
    "fault_failed": lambda said: str(said["reason"]),
    "migration_ended": lambda said: f"{said['outcome']}: {said['reason']}",
    "guest_lost": lambda said: str(said["reason"]),
    "run_broken": lambda said: f"taking everything down: {said['reason']}",
}


class Steps:
    """Of one run, as far as it has come."""

    def __init__(self) -> None:
        self._place = -1

    def begun(self, event: Event) -> str:
        """The step that begins with this event; "" where none does (Rule 1)."""
        place = _PLACES.get(event.name)
        if place is None or (place <= self._place and event.name not in ATTEMPT_BEGINS):
            return ""
        self._place = place
        return STEPS[event.name]

    def line(self, event: Event) -> str:
        """What there is to tell of this event in a list of lines; "" where it is nothing."""
        step = self.begun(event)
        return SENTENCES[event.name](event.fields) if event.name in SENTENCES else step
