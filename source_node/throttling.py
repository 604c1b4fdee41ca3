"""The throttle of the guest's vCPU (auto-converge), and what it cost the guest.

Rule 1: whatever happens, a throttle that was set is lifted: the agent is asked until it answers or its process is
        gone. A guest that was given away leaves its throttle behind.
Rule 2: the cost is a comparison of the guest with itself: operations and CPU time at its pace from the request to
        migrate until the first step, against what it did while it was throttled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from host.clock import now_ns
from host.errors import AgentLost

if TYPE_CHECKING:
    from host.local_guest import LocalGuest


@dataclass(frozen=True, slots=True)
class Sample:
    """The guest's counters at one instant."""

    at_ns: int
    operations: int
    cpu_seconds: float

    def since(self, before: Sample) -> Sample:
        """The differences."""
        return Sample(
            self.at_ns - before.at_ns,
            self.operations - before.operations,
            self.cpu_seconds - before.cpu_seconds,
        )


class GuestThrottle:
    """One attempt's. Used by the migration's thread."""

    def __init__(self, guest: LocalGuest) -> None:
        self.percent = 0
        self._guest = guest
        self._steps: list[dict[str, float]] = []
        self._first: Sample | None = None  # when the migration was asked for
        self._free: Sample | None = None  # until the first step
        self._set: Sample | None = None  # since when it is in force
        self._under = Sample(0, 0, 0.0)  # summed over the spans in which it was

    def begin(self) -> None:
        """The migration begins: how fast the guest is when nobody throttles it. Raises AgentLost, AgentError."""
        self._first = self._sample()

    def set(self, percent: int) -> None:
        """Have the vCPU sleep this share of its time; 0 lifts. Raises AgentLost when its process is gone."""
        sample = self._sample_if_it_answers()
        if percent:
            self._guest.link.throttle(percent)
        else:
            self._lift()
        if self._free is None:
            self._free = sample
        if self.percent and self._set is not None and sample is not None:
            span = sample.since(self._set)
            under = self._under
            self._under = Sample(
                under.at_ns + span.at_ns,
                under.operations + span.operations,
                under.cpu_seconds + span.cpu_seconds,
            )
        self.percent, self._set = percent, sample if percent else None
        begun_ns = self._first.at_ns if self._first is not None else 0
        self._steps.append({"percent": percent, "at_ms": round((now_ns() - begun_ns) / 1e6, 3)})

    def _lift(self) -> None:
        while True:
            try:
                self._guest.link.throttle(0)
            except AgentLost:
                if not self._guest.found_again():
                    raise
                continue
            return

    def _sample(self) -> Sample:
        hello = self._guest.hello()
        return Sample(now_ns(), hello.operations, hello.cpu_seconds)

    def _sample_if_it_answers(self) -> Sample | None:
        try:
            return self._sample()
        except AgentLost:
            return None  # a figure less; whether the agent is there is found out by who needs it

    def fields(self) -> dict[str, object]:
        """The result document's `throttle`; without figures where the guest could not be asked."""
        under, free = self._under, None
        if self._first is not None and self._free is not None:
            free = self._free.since(self._first)
        told: dict[str, object] = {
            "steps": self._steps,
            "maximum_percent": max((int(step["percent"]) for step in self._steps), default=0),
            "throttled_ms": round(under.at_ns / 1e6, 3),
            "operations": under.operations,
            "cpu_seconds": round(under.cpu_seconds, 6),
        }
        if free is not None and free.at_ns > 0:
            share = under.at_ns / free.at_ns
            told["operations_expected"] = round(free.operations * share)
            told["cpu_seconds_expected"] = round(free.cpu_seconds * share, 6)
        return told
