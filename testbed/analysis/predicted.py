"""What the model says of a migration, beside what happened.

Rule 1: a run is predicted from what its source knew at the end of round 1: how fast pages left, and how many were
        dirtied meanwhile. A sample taken before would have changed the run.
Rule 2: pure functions over a record: a recorded run is predicted again whenever it is judged again.
Rule 3: the sample, the rate and the sentence that ended the rounds stand in `basis` and `reason`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from migration.convergence import ThrottleSteps
from migration.model import Conditions, FirstRound, predict_from_round_1
from migration.rounds import Limits
from testbed.units import format_bytes, format_ms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.record.run_record import RunRecord
    from testbed.scenario.migration_keys import Migration

HANDOVER = "handover"  # the decision of the round in which the guest stands still


def limits_of(options: Migration) -> Limits:
    """The scenario's limits as the engine and the model read them."""
    steps = options.throttle
    return Limits(
        rounds_max=options.rounds_max,
        downtime_limit_ms=options.downtime_limit,
        timeout_ms=options.timeout or math.inf,
        on_rounds_max=options.on_rounds_max,
        on_timeout=options.on_timeout,
        on_stall=options.on_stall,
        throttle=ThrottleSteps(steps.start, steps.increment, steps.maximum) if steps is not None else None,
        bandwidth=options.bandwidth or None,
    )


def predicted_of(record: RunRecord) -> dict[str, Any] | None:
    """The prediction for the newest attempt of a run; None when no decision about its rounds was recorded."""
    started = record.last("migration_started", "source")
    if started is None:
        return None
    ended = [event for event in record.all("round_ended", "source") if event.at_ns >= started.at_ns]
    if not ended or ended[0].fields.get("decision", HANDOVER) == HANDOVER:
        return None
    limits = limits_of(record.scenario.migration)
    elapsed_ms = (ended[0].at_ns - started.at_ns) / 1e6
    return predicted(ended[0].fields, elapsed_ms, record.pages, limits)


def predicted(first: Mapping[str, Any], elapsed_ms: float, pages: int, limits: Limits) -> dict[str, Any]:
    """The rest of a migration from the event that ended its round 1, `elapsed_ms` after it began."""
    rate = _rate(first)
    known = FirstRound(first["sent_pages"], first["dirtied_pages"], first["duration_ms"], elapsed_ms)
    prediction = predict_from_round_1(known, pages, Conditions(rate, limits))
    basis = (
        f"round 1: {first['sent_pages']:,} pages in {first['duration_ms']:.1f} ms, "
        f"{first['dirtied_pages']:,} dirtied, "
        + (f"{format_bytes(round(rate))}/s" if rate else "nothing sent")
    )
    return {**prediction.to_dict(), "basis": basis}


def comparison_line(foreseen: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """One line: what was predicted after round 1, and what was measured. Both have the keys of `predicted`."""
    pairs = (
        ("rounds", str),
        ("payload_bytes", format_bytes),
        ("total_ms", format_ms),
        ("downtime_ms", format_ms),
    )
    words = ", ".join(
        f"{name.rsplit('_', 1)[0]} {shown(foreseen[name])} (measured {shown(measured[name])})"
        for name, shown in pairs
    )
    return f"{words}; from {foreseen['basis']}"


def _rate(fields: Mapping[str, Any]) -> float:
    """Payload per second of a round, as its source measured it."""
    told = fields.get("rate_bytes_per_s")
    if told is not None:
        return float(told)
    duration_ms = float(fields["duration_ms"])
    return float(fields["payload_bytes"]) * 1e3 / duration_ms if duration_ms else 0.0
