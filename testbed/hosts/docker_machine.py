"""What stands in the way of hosts in containers, found out before anything is started.

Rule 1: every engine that the scenario names is asked; what it answers is the reason, one line each.
Rule 2: memory and the device that tracks writes are this machine's only where the engine is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.errors import MachineCannotError
from testbed.hosts.container import DEVICE
from testbed.hosts.engine import connect
from testbed.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.scenario.document import Scenario


def lacks(scenario: Scenario, *, needed_bytes: int, available_bytes: int) -> Iterator[str]:
    """One line for each thing that is missing. Raises UsageError for a context that does not exist."""
    local = False
    for context in dict.fromkeys((scenario.hosts.context_source, scenario.hosts.context_dest)):
        try:
            engine = connect(context)
        except MachineCannotError as error:
            yield from error.problems
            continue
        local = local or engine.local
        engine.close()
    if not local:
        return
    if needed_bytes > available_bytes:
        yield (
            f"a {format_bytes(scenario.guest.memory)} guest on {len(scenario.origins)} hosts needs "
            f"{format_bytes(needed_bytes)} of memory and {format_bytes(available_bytes)} are available; choose a "
            "smaller guest.memory"
        )
    migration = scenario.migration
    tracks = migration.tracker == "uffd" or (migration.hints and not scenario.rehearses)
    if tracks and not DEVICE.exists():
        yield (
            f"{DEVICE} is missing, by which containers have the kernel track the guest's writes; it needs "
            "Linux 6.7, or use migration.tracker = 'hash' with skip = 'none' or 'zero'"
        )
