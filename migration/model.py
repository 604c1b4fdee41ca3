"""What a pre-copy migration will cost, computed before it happens (FACTS section 7).

Rule 1: round 1 carries V = what the arm does not leave out; round i + 1 carries what the guest dirtied while
        round i went: V_(i+1) = curve(T_i), T_i = V_i * page / rate + overhead. With the curve min(D * T, W) these
        are the formulas of the literature: V_i = V * lambda^i, lambda = D * page / rate, until W caps it.
Rule 2: the end is decided as the source decides it: by the estimate of `migration.rounds`, against the same limits.
Rule 3: a prediction says whether the rounds converge. Where they do not, it says what the limits make of that.
Rule 4: everything comes in as measured; what is assumed is a named constant, and stands in the prediction's basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from migration.errors import LocalProtocolError
from migration.events import Skip
from migration.handover import Handover, expected
from migration.pages import PAGE_BYTES
from migration.rounds import DecisionKind, RoundStats, decide, estimated_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migration.rounds import Limits

# Assumed where nobody measured: what one page stream of this program carries on two cores, hashed at both ends.
RATE_BYTES_PER_S_ASSUMED = 900_000_000
SETUP_MS_ASSUMED = 15.0  # the destination's memory, the connection, arming the tracker
ROUND_MS_ASSUMED = 5.0  # a harvest, a hint report, the last acknowledgements
# What the stop takes beside its pages.
SWITCH_MS_ASSUMED = sum(expected({}, 0.0).parts(0.0, math.inf).values())


class DirtyCurve:
    """How many distinct pages the guest writes within a time: its writable working set as a curve.

    Straight between the points, from the origin; beyond the last it goes on as steep as it was there, up to
    `pages_max`.
    """

    def __init__(self, times_s: Sequence[float], pages: Sequence[float], pages_max: float) -> None:
        times, counts = np.array([0.0, *times_s]), np.array([0.0, *pages])
        if times.size != counts.size or (np.diff(times) <= 0).any() or (np.diff(counts) < 0).any():
            raise LocalProtocolError("a dirty curve rises with time", points=times.size - 1)
        self._times, self._counts, self._pages_max = times, counts, pages_max
        self._slope = float((counts[-1] - counts[-2]) / (times[-1] - times[-2])) if times.size > 1 else 0.0

    @classmethod
    def capped(cls, pages_per_s: float, working_set_pages: float) -> DirtyCurve:
        """min(D * T, W)."""
        if pages_per_s <= 0 or working_set_pages <= 0:
            return cls((), (), 0)
        full_s = working_set_pages / pages_per_s
        return cls((full_s, 2 * full_s), (working_set_pages, working_set_pages), working_set_pages)

    @classmethod
    def of_samples(cls, samples: Sequence[tuple[float, int]], pages_max: float) -> DirtyCurve:
        """Through (seconds, pages) in any order; a longer time never counts fewer pages than a shorter."""
        times: list[float] = []
        counts: list[int] = []
        most = 0
        for seconds, pages in sorted(samples):
            most = max(most, pages)
            if seconds > 0 and (not times or seconds > times[-1]):
                times.append(seconds)
                counts.append(most)
            elif counts:
                counts[-1] = most
        return cls(times, counts, pages_max)

    def pages(self, elapsed_s: float) -> float:
        """Distinct pages written within `elapsed_s`."""
        if elapsed_s <= self._times[-1]:
            return float(np.interp(elapsed_s, self._times, self._counts))
        beyond = self._counts[-1] + self._slope * (elapsed_s - self._times[-1])
        return float(max(self._counts[-1], min(beyond, self._pages_max)))


@dataclass(frozen=True, slots=True)
class GuestPages:
    """What a guest's memory consists of, in pages.

    Attributes:
        pages: all of it. populated: of them, those with storage; the others read as zero.
        free: what the guest would hint. free_populated: of them, those with storage, where that was measured.
        zero_populated: pages with storage that hold nothing but zero.
        ballooned: never read nor sent.
        hinted_share: of the free pages, those whose hint comes before they are sent.
        freed_share: of the pages dirtied in a round, those that are free again when the next round asks for hints.
    """

    pages: int
    populated: int
    free: int
    ballooned: int = 0
    free_populated: int | None = None
    zero_populated: int = 0
    hinted_share: float = 1.0
    freed_share: float = 0.0

    def first_round_pages(self, skip: Skip) -> float:
        """V: the pages whose content crosses in round 1."""
        holes = max(self.pages - self.populated - self.ballooned, 0)
        if skip is Skip.NONE:
            return self.pages - self.ballooned
        if skip is Skip.ZERO:
            return max(self.populated - self.zero_populated, 0)
        free = self.free * self.hinted_share
        if skip is Skip.HINT:
            return max(self.pages - self.ballooned - free, 0)
        # Whatever was never touched is free: a used page was written.
        known = self.free_populated is not None
        free_holes = self.free - (self.free_populated or 0) if known else min(holes, self.free)
        free_with_storage = (self.free - free_holes) * self.hinted_share
        return max(self.populated - self.zero_populated - free_with_storage, 0)


@dataclass(frozen=True, slots=True)
class Costs:
    """What is not page payload, in milliseconds."""

    setup_ms: float = SETUP_MS_ASSUMED
    round_ms: float = ROUND_MS_ASSUMED
    switch_ms: float = SWITCH_MS_ASSUMED


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the pages meet: the link's payload rate in bytes a second (0: not measured), limits, other costs."""

    rate_bytes_per_s: float
    limits: Limits
    costs: Costs = Costs()

    @property
    def rate(self) -> float:
        """The rate to reckon with."""
        return estimated_rate(self.rate_bytes_per_s, self.limits)


@dataclass(frozen=True, slots=True)
class FirstRound:
    """What is known when round 1 is over.

    Attributes:
        payload_pages, dirtied_pages: pages it carried, and pages in the harvest that ended it.
        duration_ms: of the round. elapsed_ms: since the migration was asked for.
    """

    payload_pages: int
    dirtied_pages: int
    duration_ms: float
    elapsed_ms: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What to expect.

    Attributes:
        outcome: "completed" or "cancelled". converges: the downtime limit is met before another limit ends it.
        rounds: with the one in which the guest stands still. round_pages: what each carries, rounded.
        downtime_ms: of a cancelled migration what it would be at its end.
        reason: the last decision, in one sentence.
    """

    outcome: str
    converges: bool
    rounds: int
    round_pages: tuple[int, ...]
    payload_bytes: int
    total_ms: float
    downtime_ms: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """For documents, without the list of rounds."""
        return {
            "outcome": self.outcome,
            "converges": self.converges,
            "rounds": self.rounds,
            "payload_bytes": self.payload_bytes,
            "total_ms": round(self.total_ms, 3),
            "downtime_ms": round(self.downtime_ms, 3),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class _Writing:
    """How the guest dirties pages, and how many of those it frees before the next round asks."""

    curve: DirtyCurve
    freed_share: float = 0.0


def predict(guest: GuestPages, skip: Skip, curve: DirtyCurve, conditions: Conditions) -> Prediction:
    """A whole migration, from the request on."""
    first = guest.first_round_pages(skip)
    costs = conditions.costs
    took_ms = _carry_ms(first, conditions.rate) + costs.round_ms
    writing = _Writing(curve, guest.freed_share if skip.uses_hints else 0.0)
    return _go_on(first, curve.pages(took_ms / 1e3), costs.setup_ms + took_ms, writing, conditions)


def predict_from_round_1(first: FirstRound, pages: int, conditions: Conditions) -> Prediction:
    """The rest of a migration of `pages` pages; what round 1 found dirty is the only sample of the guest."""
    curve = DirtyCurve((max(first.duration_ms, 1e-3) / 1e3,), (first.dirtied_pages,), pages)
    return _go_on(first.payload_pages, first.dirtied_pages, first.elapsed_ms, _Writing(curve), conditions)


def predict_from_within(
    index: int, carry_ms: float, times_ms: tuple[float, float], curve: DirtyCurve, conditions: Conditions
) -> Prediction:
    """The rest of a migration in the middle of round `index`; the prediction's rounds begin with that one.

    What remains of that round takes `carry_ms`; it, and the migration, went on for `times_ms`.
    """
    round_ms, elapsed_ms = times_ms
    left_ms = carry_ms + conditions.costs.round_ms
    pages = carry_ms * conditions.rate / PAGE_BYTES / 1e3
    dirtied = curve.pages((round_ms + left_ms) / 1e3)
    return _go_on(pages, dirtied, elapsed_ms + left_ms, _Writing(curve), conditions, index)


def _go_on(  # noqa: PLR0917 - one state of rounds, spelled out
    first_pages: float,
    dirtied: float,
    elapsed_ms: float,
    writing: _Writing,
    conditions: Conditions,
    index: int = 1,
) -> Prediction:
    """Round after round, each followed by the source's own decision."""
    rate, limits, costs = conditions.rate, conditions.limits, conditions.costs
    carried = [first_pages]
    before: list[int] = []
    throttle_percent = 0
    while True:
        remaining = round(dirtied)
        stats = RoundStats(
            index, elapsed_ms, remaining, rate, tuple(before), throttle_percent,
            handover=Handover(prepare=costs.switch_ms),
        )  # fmt: skip
        decision = decide(stats, limits)
        if decision.kind in {DecisionKind.STOP_COPY, DecisionKind.CANCEL}:
            break
        before.append(remaining)
        if decision.kind is DecisionKind.THROTTLE:
            before, throttle_percent = [], decision.throttle_percent
        index += 1
        carried.append(dirtied * (1 - writing.freed_share))
        took_ms = _carry_ms(carried[-1], rate) + costs.round_ms
        elapsed_ms += took_ms
        dirtied = writing.curve.pages(took_ms / 1e3 * (1 - throttle_percent / 100))
    converges = decision.downtime_ms_estimated <= limits.downtime_limit_ms
    downtime_ms = _carry_ms(dirtied, rate) + costs.switch_ms
    completed = decision.kind is DecisionKind.STOP_COPY
    if completed:
        carried.append(dirtied)
        elapsed_ms += downtime_ms
    pages = tuple(round(count) for count in carried)
    return Prediction(
        outcome="completed" if completed else "cancelled",
        converges=converges,
        rounds=len(pages),
        round_pages=pages,
        payload_bytes=sum(pages) * PAGE_BYTES,
        total_ms=elapsed_ms,
        downtime_ms=downtime_ms,
        reason=decision.reason if converges else f"does not converge: {decision.reason}",
    )


def _carry_ms(pages: float, rate_bytes_per_s: float) -> float:
    return pages * PAGE_BYTES * 1e3 / rate_bytes_per_s
