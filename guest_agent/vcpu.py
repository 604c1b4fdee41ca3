"""The guest's one vCPU: runs the workloads' slices, one at a time, fairly.

Rule 1: a workload runs only inside the gate, one `step` per pass; between steps everything is consistent.
Rule 2: the workload that is due for longest goes first, so none starves another.
Rule 3: throttling makes the vCPU sleep outside the gate: a throttled guest pauses at once.
"""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from guest_agent.clock import GuestClock
    from guest_agent.gate import PauseGate
    from guest_agent.workloads.base import Workload

__all__ = ["THROTTLE_PERCENT_MAX", "Vcpu"]

IDLE_NS_MAX = (
    50_000_000  # an idle vCPU looks again at least this often: a new throttle or an end is seen soon
)
THROTTLE_PERCENT_MAX = 99  # as QEMU's auto-converge: a guest is slowed, never stopped, by throttling
THROTTLE_SLEEP_S_MAX = 0.5  # a 5 ms step at 99 % sleeps this long


class Vcpu:
    """Runs the steps of all workloads. `run` is the body of the vCPU thread."""

    def __init__(
        self, workloads: Sequence[Workload], clock: GuestClock, gate: PauseGate, stopping: threading.Event
    ) -> None:
        self._workloads = workloads
        self._clock = clock
        self._gate = gate
        self._stopping = stopping
        self._throttle_percent = 0

    @property
    def throttle_percent(self) -> int:
        """Share of its time that the vCPU sleeps, 0..99."""
        return self._throttle_percent

    @throttle_percent.setter
    def throttle_percent(self, percent: int) -> None:
        assert 0 <= percent <= THROTTLE_PERCENT_MAX, percent
        self._throttle_percent = percent

    def run(self) -> None:
        """Run steps until the gate shuts.

        Raises:
            GateShut: the agent ends.
            Exception: whatever a workload raises; the guest is broken then.
        """
        due = [(0, index) for index in range(len(self._workloads))]
        while not self._stopping.is_set():
            with self._gate:
                sleep_s = self._pass(due)
            if sleep_s > 0:
                self._stopping.wait(sleep_s)

    def _pass(self, due: list[tuple[int, int]]) -> float:
        """One step of the workload that is due for longest; seconds to sleep afterwards."""
        started_ns = self._clock.now_ns()
        if not due or due[0][0] > started_ns:
            return min(due[0][0] - started_ns if due else IDLE_NS_MAX, IDLE_NS_MAX) / 1e9
        _, index = due[0]
        cpu_started = time.perf_counter()
        wait_ns = self._workloads[index].step(started_ns)
        assert wait_ns >= 0, (self._workloads[index].name, wait_ns)
        heapq.heapreplace(due, (started_ns + wait_ns, index))
        percent = self._throttle_percent
        return min((time.perf_counter() - cpu_started) * percent / (100 - percent), THROTTLE_SLEEP_S_MAX)
