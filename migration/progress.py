"""How far a migration is and when it will be over: what is known now, and the model for the rest.

Rule 1: what remains is what must still cross: pages that hints took out are no part of it.
Rule 2: how the guest writes is known from the rounds that ended, each with its own length; in round 1 it is not,
        and what depends on it is not told.
Rule 3: with the guest paused nothing is predicted any more: what remains is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migration.model import DirtyCurve, predict_from_within
from migration.pages import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migration.model import Conditions


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the rounds are.

    Attributes:
        samples: (seconds, pages dirtied within) of the rounds that ended.
        round_index, remaining_pages, round_ms: of the round under way; how long it has gone on.
        elapsed_ms: since the migration was asked for. pages: of the guest. paused: for good.
    """

    samples: Sequence[tuple[float, int]]
    round_index: int
    remaining_pages: int
    round_ms: float
    elapsed_ms: float
    pages: int
    paused: bool


@dataclass(frozen=True, slots=True)
class Outlook:
    """What to expect; None: not known yet. In round 1, where no dirty rate is known, `eta_ms` is a lower bound."""

    remaining_bytes: int
    dirty_pages_per_s: int | None
    expected_downtime_ms: float | None
    expected_rounds: int | None
    eta_ms: float

    def fields(self) -> dict[str, object]:
        """Of the event."""
        return {
            "remaining_bytes": self.remaining_bytes,
            "dirty_pages_per_s": self.dirty_pages_per_s,
            "expected_downtime_ms": self.expected_downtime_ms,
            "expected_rounds": self.expected_rounds,
            "eta_ms": self.eta_ms,
        }


def outlook(standing: Standing, conditions: Conditions) -> Outlook:
    """What the model makes of it. The rate in `conditions` counts every page that is dealt with as 4096 bytes."""
    remaining_bytes = standing.remaining_pages * PAGE_BYTES
    carry_ms = remaining_bytes * 1e3 / conditions.rate
    dirty_rate = None
    if standing.samples:
        seconds, dirtied = standing.samples[-1]
        dirty_rate = round(dirtied / seconds) if seconds > 0 else 0
    if standing.paused or not standing.samples:
        eta_ms = carry_ms + conditions.costs.switch_ms
        return Outlook(remaining_bytes, dirty_rate, None, None, round(eta_ms, 1))
    curve = DirtyCurve.of_samples(standing.samples, standing.pages)
    prediction = predict_from_within(
        standing.round_index, carry_ms, (standing.round_ms, standing.elapsed_ms), curve, conditions
    )
    return Outlook(
        remaining_bytes,
        dirty_rate,
        round(prediction.downtime_ms, 1),
        standing.round_index - 1 + prediction.rounds,
        round(prediction.total_ms - standing.elapsed_ms, 1),
    )
