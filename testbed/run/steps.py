"""What a run is doing, in a person's words, from its events.

Rule 1: a step is told when it begins. None is told twice, and none goes back, before another attempt begins: a host
        that says late that it is there does not let the guest boot again on the screen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
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
