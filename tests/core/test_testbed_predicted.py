"""Predicted against measured: from what round 1 told, with the scenario's own limits."""

from __future__ import annotations

import pytest

from migration.rounds import Limits
from testbed.analysis.predicted import comparison_line, limits_of, predicted
from testbed.scenario.migration_keys import Migration, Throttle

FIRST = {
    "round": 1, "sent_pages": 20_000, "dirtied_pages": 4000, "duration_ms": 800.0, "payload_bytes": 20_000 * 4096,
    "decision": "next_round",
}  # fmt: skip


def test_the_limits_are_the_scenarios():
    options = Migration(
        rounds_max=7,
        downtime_limit=40,
        timeout=0,
        bandwidth=0,
        on_stall="throttle",
        throttle=Throttle(maximum=80),
    )
    found = limits_of(options)
    assert (found.rounds_max, found.downtime_limit_ms, found.bandwidth) == (7, 40, None)
    assert found.timeout_ms == float("inf")
    assert found.throttle is not None
    assert (found.throttle.start_percent, found.throttle.maximum_percent) == (20, 80)


def test_a_prediction_says_what_it_is_made_of():
    found = predicted(FIRST, 815.0, 100_000, Limits(downtime_limit_ms=75))
    # 25,000 pages a second; 5000 dirtied a second: 4000 left are 160 ms, 800 and some are 33 ms, and the hand-over.
    assert found["rounds"] == 3
    assert found["converges"]
    assert found["payload_bytes"] == pytest.approx(24_820 * 4096, rel=0.01)
    assert found["basis"].startswith("round 1: 20,000 pages in 800.0 ms, 4,000 dirtied, ")


def test_a_rate_that_the_source_measured_goes_before_one_computed_here():
    slow = predicted(
        FIRST | {"rate_bytes_per_s": 1e6}, 815.0, 100_000, Limits(downtime_limit_ms=50, rounds_max=1)
    )
    assert slow["downtime_ms"] == pytest.approx(4000 * 4096 / 1e3, rel=0.01)


def test_the_comparison_is_one_line():
    foreseen = predicted(FIRST, 815.0, 100_000, Limits(downtime_limit_ms=75))
    measured = {"rounds": 4, "payload_bytes": 97 << 20, "total_ms": 1100.0, "downtime_ms": 61.0}
    line = comparison_line(foreseen, measured)
    assert line.startswith("rounds 3 (measured 4), payload 97.0 MiB (measured 97.0 MiB), ")
    assert line.endswith(foreseen["basis"])
    assert "\n" not in line
