"""A round sends every candidate exactly once or has it skipped by a hint, and its books balance."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migration.errors import LocalProtocolError
from migration.ledger import MigrationLedger, RoundLedger, RoundTotals
from migration.round_set import RoundSet

PAGES = 3000


def ranges_of(runs):
    return np.array([r[0] for r in runs], np.uint64), np.array([r[1] for r in runs], np.uint64)


def mask_of(pfns, pages=PAGES):
    mask = np.zeros(pages, np.bool_)
    mask[list(pfns)] = True
    return mask


def one_range(round_set, first, count):
    """How many pages left the set because of it."""
    before = round_set.ledger.skipped_pages
    round_set.hint(*ranges_of([(first, count)]))
    return round_set.ledger.skipped_pages - before


class RoundModel(RuleBasedStateMachine):
    """RoundSet against plain Python sets."""

    @initialize(data=st.data())
    def start(self, data) -> None:
        density = data.draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
        seed = data.draw(st.integers(0, 1000))
        mask = np.random.default_rng(seed).random(PAGES) < density
        self.round = RoundSet(1, mask, hints_allowed=True)
        self.candidates = set(np.flatnonzero(mask).tolist())
        self.taken: list[int] = []
        self.hinted: set[int] = set()
        self.skipped: set[int] = set()

    @rule(
        runs=st.lists(
            st.tuples(st.integers(0, PAGES - 1), st.integers(0, 600)).map(
                lambda r: (r[0], min(r[1], PAGES - r[0]))
            ),
            max_size=12,
        )
    )
    def hint(self, runs) -> None:
        named = {pfn for first, count in runs for pfn in range(first, first + count)}
        newly_skipped = (named & self.candidates) - set(self.taken) - self.skipped
        self.round.hint(*ranges_of(runs))
        # A page that was hinted first and taken later cannot be: skipped pages are never taken.
        self.skipped |= newly_skipped
        self.hinted |= named

    @rule(count=st.integers(0, 300), zeros=st.integers(0, 300))
    def take(self, count, zeros) -> None:
        expected = sorted(self.candidates - set(self.taken) - self.skipped)[:count]
        pfns = self.round.take(count)
        assert pfns.tolist() == expected
        self.taken += expected
        zero_pages = min(zeros, pfns.size)
        self.round.record_sent(pfns.size - zero_pages, zero_pages, (pfns.size - zero_pages) * 4096)

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "round"):
            return
        assert self.round.remaining == len(self.candidates) - len(self.taken) - len(self.skipped)
        assert set(np.flatnonzero(self.round.skipped).tolist()) == self.skipped
        assert self.taken == sorted(set(self.taken))
        ledger = self.round.ledger
        assert ledger.hinted_pages == len(self.hinted)
        assert ledger.skipped_pages == len(self.skipped)
        assert ledger.absent_pages == len(self.hinted - self.candidates)
        assert ledger.hinted_pages == ledger.skipped_pages + ledger.late_pages + ledger.absent_pages

    @precondition(lambda self: self.round.remaining == 0)
    @rule(dirty_seed=st.integers(0, 1000))
    def finish(self, dirty_seed) -> None:
        dirty = np.random.default_rng(dirty_seed).random(PAGES) < 0.3
        totals = self.round.finish(dirty)
        assert totals.redirtied_pages == len(self.skipped & set(np.flatnonzero(dirty).tolist()))
        assert totals.candidate_pages == totals.sent_pages + totals.zero_pages + totals.skipped_pages
        self.start_empty()

    def start_empty(self) -> None:
        self.round = RoundSet(2, np.zeros(PAGES, np.bool_), hints_allowed=True)
        self.candidates, self.taken, self.hinted, self.skipped = set(), [], set(), set()


TestRoundModel = RoundModel.TestCase


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 399), st.integers(0, 100)), max_size=4), max_size=6),
    st.integers(0, 300),
)
def test_hints_that_nobody_looked_at_are_booked_like_those_one_by_one(batches, taken) -> None:
    """Rule 5: a page in several batches counts once, and what was taken meanwhile is late."""
    late, at_once = (RoundSet(1, mask_of(range(0, 900, 2)), hints_allowed=True) for _ in range(2))
    for round_set in (late, at_once):
        round_set.take(taken)
        for runs in batches:
            round_set.hint(*ranges_of(runs))
            if round_set is at_once:
                assert round_set.remaining >= 0
    assert late.take(1000).tolist() == at_once.take(1000).tolist()
    assert late.ledger == at_once.ledger


def test_hint_ahead_skips_hint_behind_is_late_hint_elsewhere_is_absent() -> None:
    round_set = RoundSet(1, mask_of(range(100)), hints_allowed=True)
    assert round_set.take(40).tolist() == list(range(40))
    assert one_range(round_set, 30, 80) == 60
    ledger = round_set.ledger
    assert (ledger.hinted_pages, ledger.skipped_pages, ledger.late_pages, ledger.absent_pages) == (
        80,
        60,
        10,
        10,
    )
    assert round_set.remaining == 0
    assert round_set.take(100).size == 0


def test_duplicates_and_overlaps_count_bits_not_lengths() -> None:
    """FACTS hazard 8."""
    round_set = RoundSet(1, mask_of(range(100)), hints_allowed=True)
    round_set.hint(*ranges_of([(0, 10), (5, 10), (0, 10), (14, 1)]))
    one_range(round_set, 0, 15)
    assert round_set.ledger.hinted_pages == round_set.ledger.skipped_pages == 15
    assert round_set.remaining == 85


def test_a_page_hinted_late_and_again_is_late_once() -> None:
    round_set = RoundSet(1, mask_of(range(10)), hints_allowed=True)
    round_set.take(10)
    one_range(round_set, 0, 10)
    one_range(round_set, 0, 10)
    assert round_set.ledger.late_pages == 10


def test_hint_clears_only_this_rounds_set() -> None:
    """FACTS hazard 1 as far as it is this module's: the harvest mask that was given is never written to."""
    harvested = mask_of(range(100))
    before = harvested.copy()
    round_set = RoundSet(1, harvested, hints_allowed=True)
    one_range(round_set, 0, 100)
    assert (harvested == before).all()
    assert (round_set.candidates == before).all()
    # And the other way round: who gave the mask may go on with it.
    harvested[:] = False
    assert (round_set.candidates == before).all()
    # The guest took pages 7..9 back and wrote them: the next harvest has them, and the next round sends them.
    totals = round_set.finish(mask_of([7, 8, 9, 500]))
    assert totals.redirtied_pages == 3
    assert RoundSet(2, mask_of([7, 8, 9, 500]), hints_allowed=True).take(10).tolist() == [7, 8, 9, 500]


def test_hints_are_refused_where_they_are_off_and_after_the_end() -> None:
    with pytest.raises(LocalProtocolError, match="without hints"):
        one_range(RoundSet(1, mask_of([1]), hints_allowed=False), 0, 1)
    round_set = RoundSet(1, mask_of([]), hints_allowed=True)
    round_set.finish(None)
    for late in (
        lambda: one_range(round_set, 0, 1),
        lambda: round_set.take(1),
        lambda: round_set.record_sent(0, 0, 0),
        lambda: round_set.finish(None),
    ):
        with pytest.raises(LocalProtocolError, match="over"):
            late()


def test_a_hint_beyond_memory_is_refused_and_books_nothing() -> None:
    round_set = RoundSet(1, mask_of(range(10)), hints_allowed=True)
    with pytest.raises(LocalProtocolError, match="beyond"):
        round_set.hint(*ranges_of([(0, 5), (PAGES - 1, 2)]))
    assert round_set.ledger.hinted_pages == 0
    assert round_set.remaining == 10


def test_a_round_cannot_end_with_pages_left_or_unaccounted_for() -> None:
    round_set = RoundSet(1, mask_of(range(10)), hints_allowed=True)
    round_set.take(9)
    with pytest.raises(LocalProtocolError, match="not over"):
        round_set.finish(None)
    round_set.take(1)
    round_set.record_sent(9, 0, 9 * 4096)
    with pytest.raises(LocalProtocolError, match="balance") as caught:
        round_set.finish(None)
    assert caught.value.facts["candidate_pages"] == 10
    assert caught.value.facts["sent_pages"] == 9
    round_set.record_sent(0, 1, 0)
    assert round_set.finish(None).zero_pages == 1


balanced = st.builds(
    lambda skipped, late, absent, sent, zero, redirtied: RoundLedger(
        index=1,
        candidate_pages=sent + zero + skipped,
        hinted_pages=skipped + late + absent,
        skipped_pages=skipped,
        late_pages=late,
        absent_pages=absent,
        redirtied_pages=min(redirtied, skipped),
        sent_pages=sent,
        zero_pages=zero,
    ),
    *[st.integers(0, 1 << 21)] * 6,
)


@given(balanced)
def test_balanced_ledgers_freeze_to_the_same_figures(ledger) -> None:
    assert ledger.freeze().to_dict() == dataclasses.asdict(ledger)


@given(
    balanced,
    st.sampled_from(["candidate", "hinted", "skipped", "late", "absent", "sent", "zero"]),
    st.integers(1, 5),
)
def test_one_figure_off_is_always_noticed(ledger, name, by) -> None:
    setattr(ledger, f"{name}_pages", getattr(ledger, f"{name}_pages") + by)
    with pytest.raises(LocalProtocolError, match="does not balance"):
        ledger.freeze()


def test_more_redirtied_than_skipped_is_noticed() -> None:
    with pytest.raises(LocalProtocolError):
        RoundLedger(index=1, candidate_pages=0, redirtied_pages=1).balance()


def test_the_migrations_ledger_adds_up_rounds_and_what_came_between() -> None:
    ledger = MigrationLedger()
    for index in (1, 2):
        round_set = RoundSet(index, mask_of(range(100)), hints_allowed=True)
        one_range(round_set, 90, 20)
        round_set.ledger.count_stale(5)
        round_set.ledger.count_rejected()
        taken = round_set.take(100)
        round_set.record_sent(taken.size - 1, 1, (taken.size - 1) * 4096)
        ledger.add(round_set.finish(mask_of([95])))
    ledger.count_stale(3)
    ledger.count_rejected(2)
    document = ledger.to_dict()
    rounds = document.pop("rounds")
    assert document == {
        "hinted_pages": 40,
        "skipped_pages": 20,
        "late_pages": 0,
        "absent_pages": 20,
        "redirtied_pages": 2,
        "stale_pages": 13,
        "rejected_ranges": 4,
    }
    assert [entry["index"] for entry in rounds] == [1, 2]
    assert (ledger.sent_pages, ledger.zero_pages, ledger.skipped_pages) == (178, 2, 20)
    assert ledger.payload_bytes == 178 * 4096


def test_rounds_come_in_order() -> None:
    ledger = MigrationLedger()
    zeros = dict.fromkeys((field.name for field in dataclasses.fields(RoundTotals)), 0)
    ledger.add(RoundTotals(**zeros | {"index": 2}))
    with pytest.raises(LocalProtocolError, match="order"):
        ledger.add(RoundTotals(**zeros | {"index": 2}))
