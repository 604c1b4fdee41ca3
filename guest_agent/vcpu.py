"""The guest's one vCPU: runs the workloads' slices, one at a time, fairly.

Rule 1: a workload runs only inside the gate, one `step` per pass; between steps everything is consistent.
Rule 2: the workload that is due for longest goes first, so none starves another.
Rule 3: throttling takes its share of all the vCPU's time, busy or idle, slice by slice, and outside the gate: a
        throttled guest pauses at once.
Rule 4: workloads live by the vCPU's time: what the throttle took does not pass for them, and is not made up for. So
        a rate falls by the share that the throttle takes, as that of a guest which is always busy.
"""

from __future__ import annotations

import heapq
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
SLICE_NS = 5_000_000  # it runs so long between two sleeps of a throttle: at 99 % these are half a second
THROTTLE_PERCENT_MAX = 99  # as QEMU's auto-converge: a guest is slowed, never stopped, by throttling


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
        self._slice_began_ns = 0
        self._taken_ns = 0  # by throttling, since the vCPU began

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
                sleep_ns = self._pass(due)
            if sleep_ns > 0:
                self._stopping.wait(min(sleep_ns, SLICE_NS if self._throttle_percent else sleep_ns) / 1e9)
            self._yield_share()

    def _pass(self, due: list[tuple[int, int]]) -> int:
        """One step of the workload that is due for longest; nanoseconds until there is more to do."""
        started_ns = self._clock.now_ns() - self._taken_ns
        if not due or due[0][0] > started_ns:
            return min(due[0][0] - started_ns if due else IDLE_NS_MAX, IDLE_NS_MAX)
        _, index = due[0]
        wait_ns = self._workloads[index].step(started_ns)
        assert wait_ns >= 0, (self._workloads[index].name, wait_ns)
        heapq.heapreplace(due, (started_ns + wait_ns, index))
        return 0

    def _yield_share(self) -> None:
        """Sleep what the throttle takes of the slice that is over; less, when it is lifted or the guest ends."""
        now_ns, percent = self._clock.now_ns(), self._throttle_percent
        if not percent:
            self._slice_began_ns = now_ns
        if now_ns - self._slice_began_ns < SLICE_NS:
            return
        until_ns = now_ns + (now_ns - self._slice_began_ns) * percent // (100 - percent)
        began_ns = now_ns
        while self._throttle_percent and now_ns < until_ns and not self._stopping.is_set():
            self._stopping.wait(min(until_ns - now_ns, IDLE_NS_MAX) / 1e9)
            now_ns = self._clock.now_ns()
        self._taken_ns += now_ns - began_ns
        self._slice_began_ns = now_ns
