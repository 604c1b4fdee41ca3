"""The round decision as a table: every rule once, at its edge, and in its order of precedence."""

from dataclasses import replace

import pytest

from migration.errors import LocalProtocolError
from migration.handover import (
    COMMIT_MS_ASSUMED,
    NO_STOP,
    PAUSE_MS_ASSUMED,
    PREPARE_MS_ASSUMED,
    Handover,
    LastStop,
    expected,
)
from migration.rounds import (
    RATE_BYTES_PER_S_ASSUMED,
    DecisionKind,
    Limits,
    RoundStats,
    decide,
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


def estimated_ms(pages, rate, limits=LIMITS, **known) -> float:
    return decide(RoundStats(1, 50, pages, rate, **known), limits).downtime_ms_estimated


def test_a_bandwidth_lowers_the_measured_rate_and_never_raises_it() -> None:
    assert estimated_ms(1000, RATE, Limits(bandwidth=RATE / 2)) == pytest.approx(200)
    assert estimated_ms(1000, RATE, Limits(bandwidth=RATE * 2)) == pytest.approx(100)


def test_before_anything_was_measured_the_bandwidth_or_a_stated_rate_counts() -> None:
    assert estimated_ms(1000, 0, Limits(bandwidth=RATE)) == pytest.approx(100)
    assert estimated_ms(1000, 0) == pytest.approx(4_096_000_000 / RATE_BYTES_PER_S_ASSUMED)


HANDOVER = Handover(
    pause=2, harvest=1, save=3, prepare=10, commit=8, resume=4, round_trip=2, state_bytes=40_960
)


def test_the_estimate_is_of_the_whole_stop_and_its_parts_add_up() -> None:
    """40960 bytes of state at that rate are 1 ms; the last acknowledgement takes a round trip."""
    made = decide(RoundStats(1, 50, 500, RATE, handover=HANDOVER), LIMITS)
    assert made.downtime_parts_ms == {
        "pause": 2, "harvest": 1, "send": 52, "save": 3, "prepare": 11, "commit": 8, "resume": 4,
    }  # fmt: skip
    assert made.downtime_ms_estimated == pytest.approx(81)
    assert "about 81.0 ms (52.0 to send them, 29.0 to hand over)" in made.reason


@pytest.mark.parametrize(
    ("pages", "limits", "kind", "reason"),
    [
        (
            690,
            LIMITS,
            STOP,
            "within the downtime limit",
        ),  # 69 + 2 to send, 29 to hand over: exactly the limit
        (691, LIMITS, NEXT, "above the downtime limit"),
        (
            9,
            replace(LIMITS, downtime_limit_ms=29.0),
            NEXT,
            "above the downtime limit",
        ),  # nothing left would keep it
        (
            9,
            replace(LIMITS, downtime_limit_ms=0.0),
            NEXT,
            "above the downtime limit of 0",
        ),  # asks for every round
        (
            10,
            replace(LIMITS, downtime_limit_ms=28.0),
            NEXT,
            "above the downtime limit",
        ),  # 3 ms may still be saved
        (
            9,
            replace(LIMITS, downtime_limit_ms=28.0),
            STOP,
            "no round brings it within the downtime limit of 28",
        ),
        (9, replace(CANCELLING, downtime_limit_ms=28.0), CANCEL, "no round brings it within"),
        (0, replace(CANCELLING, downtime_limit_ms=28.0), STOP, "nothing is left"),
    ],
)
def test_a_limit_that_the_hand_over_alone_exceeds_is_told_at_once(pages, limits, kind, reason) -> None:
    decision = decide(RoundStats(1, 50, pages, RATE, handover=HANDOVER), limits)
    assert (decision.kind, reason in decision.reason) == (kind, True), decision.reason


def test_the_last_stop_counts_before_what_is_assumed_and_of_another_destination_only_our_parts() -> None:
    last = LastStop("b", {"pause": 1.0, "save": 1.5, "prepare": 5.0, "commit": 4.0, "resume": 2.0})
    same, other, none = (
        expected(stop.towards(peer), 3.0) for stop, peer in ((last, "b"), (last, "c"), (NO_STOP, "b"))
    )
    assert (same.pause, same.prepare, same.commit, same.state_bytes) == (1.0, 5.0, 4.0, 0)
    assert (other.pause, other.save, other.prepare) == (1.0, 1.5, PREPARE_MS_ASSUMED + 3.0)
    assert (none.pause, none.commit) == (PAUSE_MS_ASSUMED, COMMIT_MS_ASSUMED + 3.0)
    assert all(one.round_trip == 3.0 for one in (same, other, none))


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
