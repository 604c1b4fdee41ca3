"""The round decision as a table: every rule once, at its edge, and in its order of precedence."""

import pytest

from migration.errors import LocalProtocolError
from migration.rounds import (
    RATE_BYTES_PER_S_ASSUMED,
    DecisionKind,
    Limits,
    RoundStats,
    decide,
    estimated_downtime_ms,
)

NEXT, STOP, CANCEL = DecisionKind.NEXT_ROUND, DecisionKind.STOP_COPY, DecisionKind.CANCEL
LIMITS = Limits(rounds_max=5, downtime_limit_ms=100, timeout_ms=10_000)
CANCELLING = Limits(rounds_max=5, downtime_limit_ms=100, timeout_ms=10_000, on_rounds_max="cancel")
# At 40_960_000 bytes/s a page takes 0.1 ms: 1000 pages are exactly the limit.
RATE = 40_960_000.0


@pytest.mark.parametrize(
    ("stats", "limits", "kind", "reason"),
    [
        (RoundStats(1, 50, 0, RATE), LIMITS, STOP, "nothing is left"),
        (RoundStats(9, 99_999, 0, 0.0), CANCELLING, STOP, "nothing is left"),
        (RoundStats(1, 50, 1000, RATE), LIMITS, STOP, "within the downtime limit of 100 ms"),
        (RoundStats(1, 50, 1001, RATE), LIMITS, NEXT, "above the downtime limit"),
        (RoundStats(9, 99_999, 1000, RATE), CANCELLING, STOP, "within the downtime limit"),
        (RoundStats(1, 9_999, 1001, RATE), LIMITS, NEXT, "above the downtime limit"),
        (RoundStats(1, 10_000, 1001, RATE), LIMITS, CANCEL, "timeout of 10000 ms"),
        (RoundStats(5, 10_000, 1001, RATE), LIMITS, CANCEL, "timeout"),
        (RoundStats(4, 50, 1001, RATE), LIMITS, NEXT, "above the downtime limit"),
        (RoundStats(5, 50, 1001, RATE), LIMITS, STOP, "last of 5 rounds"),
        (RoundStats(5, 50, 1001, RATE), CANCELLING, CANCEL, "last of 5 rounds"),
    ],
)
def test_decision_table(stats, limits, kind, reason) -> None:
    decision = decide(stats, limits)
    assert decision.kind is kind
    assert reason in decision.reason


def test_a_bandwidth_lowers_the_measured_rate_and_never_raises_it() -> None:
    slow = Limits(bandwidth=RATE / 2)
    fast = Limits(bandwidth=RATE * 2)
    assert estimated_downtime_ms(1000, RATE, slow) == pytest.approx(200)
    assert estimated_downtime_ms(1000, RATE, fast) == pytest.approx(100)


def test_before_anything_was_measured_the_bandwidth_or_a_stated_rate_counts() -> None:
    assert estimated_downtime_ms(1000, 0, Limits(bandwidth=RATE)) == pytest.approx(100)
    assert estimated_downtime_ms(1000, 0, Limits()) == pytest.approx(4_096_000_000 / RATE_BYTES_PER_S_ASSUMED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds_max": 0},
        {"downtime_limit_ms": -1},
        {"timeout_ms": 0},
        {"bandwidth": 0},
        {"on_rounds_max": "hope"},
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong) -> None:
    with pytest.raises(LocalProtocolError):
        Limits(**wrong)
