"""The account of the downtime: its parts tile it, whatever happened in between."""

from hypothesis import given
from hypothesis import strategies as st

from migration.handover import NO_TIME, OWN_PARTS, PEER_PARTS, expected
from source_node.accounting import PARTS, Stopwatch

MS = 1_000_000
STEPS = ("pause", "harvest", "send", "save", "prepare", "commit")
DURATIONS = st.integers(0, 40 * MS)


@given(
    passed=st.lists(st.tuples(st.sampled_from(STEPS[:-1]), DURATIONS), max_size=12),
    commit_ns=DURATIONS,
    verify_ns=DURATIONS,
    resume_ns=DURATIONS,
)
def test_the_parts_sum_to_the_downtime_also_where_one_was_gone_through_again(
    passed, commit_ns, verify_ns, resume_ns
):
    """A connection that was lost while the guest stood still sends, saves and prepares more than once."""
    watch = Stopwatch(requested_ns=1 * MS, first_round_ns=2 * MS)
    instant = 10 * MS
    watch.pause_ordered(instant)
    for part, duration in passed:
        instant += duration
        watch.passed(part, instant)
    watch.decided(instant + commit_ns, verify_ns=verify_ns, resume_ns=resume_ns)
    times = watch.times()
    parts = times["downtime_parts_ms"]
    counted = sum(value for name, value in parts.items() if name != "verify")
    assert abs(counted - times["downtime_ms"]) <= 0.001 * len(PARTS)  # each is rounded to a microsecond
    assert abs(times["downtime_ms"] + times["verify_ms"] - (instant + commit_ns - 10 * MS) / MS) <= 0.002
    assert all(value >= 0 for value in parts.values())
    assert set(parts) == set(PARTS)


def test_hashing_is_taken_out_of_the_call_it_happened_in_and_out_of_the_downtime():
    watch = Stopwatch(requested_ns=0)
    watch.pause_ordered(100 * MS)
    watch.passed("prepare", 170 * MS)
    watch.decided(180 * MS, verify_ns=60 * MS, resume_ns=4 * MS)
    times = watch.times()
    assert times["downtime_parts_ms"]["prepare"] == 10
    assert times["downtime_parts_ms"]["commit"] == 6
    assert (times["downtime_ms"], times["verify_ms"]) == (20, 60)


def test_no_destination_can_claim_to_have_hashed_for_longer_than_its_call_took():
    watch = Stopwatch(requested_ns=0)
    watch.pause_ordered(100 * MS)
    watch.passed("prepare", 110 * MS)
    watch.decided(120 * MS, verify_ns=1000 * MS, resume_ns=0)
    assert watch.times()["downtime_ms"] == 10
    assert watch.times()["verify_ms"] == 10


def test_an_attempt_taken_up_after_a_restart_has_no_downtime_of_its_own():
    watch = Stopwatch(requested_ns=5 * MS)
    watch.passed("prepare", 50 * MS)
    watch.decided(60 * MS, verify_ns=0, resume_ns=3 * MS)
    times = watch.times()
    assert times["downtime_ms"] == 0
    assert not any(times["downtime_parts_ms"].values())


def test_what_is_expected_has_the_names_of_what_was():
    """So that both stand beside each other, and what was measured is taken over. Hashing is no downtime."""
    assert [*NO_TIME.parts(0.0, 1.0)] == [name for name in PARTS if name != "verify"]
    measured = dict.fromkeys(OWN_PARTS + PEER_PARTS, 7.0)
    assert expected(measured, 0.0).parts(7.0, 1.0) == dict.fromkeys(NO_TIME.parts(0.0, 1.0), 7.0)
