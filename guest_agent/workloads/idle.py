"""A guest that does nothing: the baseline of every comparison.

Rule 1: no pages, no operations, nothing to check; only the guest's own clock goes on.
"""

from collections.abc import Mapping
from typing import Any

from guest_agent.oracle import Expectations
from guest_agent.workloads.base import IDLE_NS, Guest, Workload


class Idle(Workload):
    """Nothing, for ever."""

    kind = "idle"

    def set_up(self, guest: Guest) -> None:
        """Need nothing."""

    def step(self, now_ns: int) -> int:
        """Do nothing."""
        del now_ns
        return IDLE_NS

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Need nothing."""

    def check(self, expected: Expectations) -> list[str]:
        """Expect nothing."""
        del expected
        return []
