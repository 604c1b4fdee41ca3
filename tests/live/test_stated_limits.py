"""Limits, stall and throttle of whole migrations: each ends as it was stated, and says so in a line."""

import pytest

from tests.live.runs import TINY, guest_is_whole, perform, scenario

pytestmark = pytest.mark.live

MIB = 1 << 20
# It dirties 12 MiB over and over, faster than the link carries: without a limit's word the rounds never shrink.
RESTLESS = """
[guest]
memory = "64MiB"
[[guest.workload]]
name = "writer"
rate = "8000pages/s"
working_set = "12MiB"
[[guest.workload]]
name = "kv"
records = 1000
operations_per_second = 300
[migration]
skip = "zero"
bandwidth = "16MiB/s"
downtime_limit = "60ms"
[run]
settle = "50ms"
run_on = "50ms"
"""


def ends(tmp_path, outcome, *overrides, text=RESTLESS):
    """A run that ends so, valid, and every decision of which is a line with a reason."""
    run = perform(tmp_path, scenario(*(f"migration.{one}" for one in overrides), text=text, expect=outcome))
    result = run.result
    assert (result.outcome, result.verdict) == (outcome, "valid"), (result.outcome_reason, result.reasons)
    assert result.decisions
    assert all(made.reason.strip() and "\n" not in made.reason for made in result.decisions)
    guest_is_whole(run, "dest" if outcome == "completed" else "source")
    return result


def test_rounds_that_stop_shrinking_are_throttled_until_they_do_and_the_report_says_what_it_cost(tmp_path):
    result = ends(tmp_path, "completed", "on_stall=throttle", "throttle.start=40", "throttle.maximum=99",
                  "throttle.increment=40")  # fmt: skip
    kinds = [made.decision for made in result.decisions]
    assert "throttle" in kinds
    assert "within the downtime limit" in next(
        made.reason for made in result.decisions if made.decision == "stop_copy"
    )
    assert next(step["percent"] for step in result.throttle.steps) == 40
    assert result.throttle.steps[-1]["percent"] == 0, "lifted"
    assert 0 < result.throttle.operations < result.throttle.operations_expected
    assert result.downtime_ms_estimated <= 60


@pytest.mark.parametrize(
    ("overrides", "outcome", "words"),
    [
        (["on_stall=cancel"], "cancelled", "stalled"),
        (["on_stall=switch"], "completed", "local minimum"),
        (["rounds_max=2"], "completed", "after the last of 2 rounds"),
        (["rounds_max=2", "on_rounds_max=cancel"], "cancelled", "after the last of 2 rounds"),
        (["timeout=2s"], "cancelled", "timeout of 2000 ms"),
        (["timeout=2s", "on_timeout=switch"], "completed", "timeout of 2000 ms"),
    ],
)
def test_a_limit_ends_a_migration_that_does_not_converge_as_it_says(tmp_path, overrides, outcome, words):
    result = ends(tmp_path, outcome, *overrides)
    assert any(words in made.reason for made in result.decisions), result.decisions
    if outcome == "cancelled":
        assert words in result.outcome_reason


def test_a_limit_that_the_hand_over_alone_exceeds_is_told_and_not_tried_for_thirty_rounds(tmp_path):
    result = ends(tmp_path, "completed", "downtime_limit=1ms", text=TINY)
    assert len(result.rounds) < 30
    stop = next(made.reason for made in result.decisions if made.decision == "stop_copy")
    assert "no round brings it within the downtime limit of 1 ms" in stop or "nothing is left" in stop


def test_a_bandwidth_is_of_the_wire_over_the_whole_migration(tmp_path):
    result = ends(tmp_path, "completed", "rounds_max=2", "on_stall=none")
    sending_s = (result.total_ms - result.setup_ms) / 1000
    assert 0.7 * 16 * MIB < result.bytes.wire_tx / sending_s < 1.05 * 16 * MIB


def test_a_destination_that_stands_still_costs_its_source_a_bounded_memory(tmp_path):
    """256 MiB to be sent, of which no more than the window of 64 MiB waits for it."""
    big = RESTLESS.replace("64MiB", "256MiB").replace('bandwidth = "16MiB/s"', "").replace("zero", "none")
    stands = '[[fault]]\nkind = "pause"\nwhat = "dest_node"\nat = "round 1 10%"\nfor = "2s"\n'
    bounded = ends(tmp_path / "slow", "completed", "rounds_max=2", text=big + stands)
    free = ends(tmp_path / "fast", "completed", "rounds_max=2", text=big)
    assert bounded.faults[0].healed_at_ms - bounded.faults[0].applied_at_ms >= 2000
    more = bounded.own_memory.source_own_peak_bytes - free.own_memory.source_own_peak_bytes
    assert more < 80 * MIB
