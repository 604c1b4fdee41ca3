"""Whether a host has room for one more guest.

Rule 1: a refusal says in one line what is lacking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dest_node.outcomes import IntakeRefused
from host.resources import available_memory_bytes

if TYPE_CHECKING:
    from host.context import HostContext


def check_room(host: HostContext, memory_bytes: int, *, held_bytes: int, must_stand_by: bool) -> None:
    """Raises IntakeRefused. `held_bytes` are the attempt's at hand, and given back before a new one stores any.

    With `must_stand_by` the agent has to be free; otherwise it is known what it holds.
    """
    guest, limit = host.guest, host.guest_memory_bytes_max
    if not guest.attached:
        raise IntakeRefused(f"host {host.name} has no guest agent yet")
    state = guest.hello().state
    if state != "standby" and must_stand_by:
        raise IntakeRefused(f"the guest agent of host {host.name} is {state}, not standby")
    if limit and memory_bytes > limit:
        raise IntakeRefused(
            f"host {host.name} holds guests of at most {limit} bytes, this one has {memory_bytes}"
        )
    available = available_memory_bytes() + held_bytes
    if memory_bytes > available:
        raise IntakeRefused(
            f"host {host.name} has {available} bytes of memory left, this guest needs {memory_bytes}"
        )
