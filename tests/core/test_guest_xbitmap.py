"""The sparse bitmap is a set of 64-bit numbers: against a plain set, at the edges, and the series' own bugs.

The named tests at the end are what reviewers found in the historic implementation (FACTS 2.1).
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from guest_agent.xbitmap import INDEX_MAX, LEAF_BITS, XBitmap, XBitmapNoMemory, XBitmapTryAgain

EDGES = [0, 1, 63, 64, 65, 127, 128, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 2**32 - 1, 2**32, 2**32 + 1]
EDGES += [
    2**63 - 1,
    2**63,
    2**64 - 1025,
    2**64 - 1024,
    2**64 - 1023,
    2**64 - 65,
    2**64 - 64,
    2**64 - 2,
    INDEX_MAX,
]
# Where leaves meet, where words meet, and both ends of the number line: bits near each other make runs.
NEAR = st.builds(
    lambda base, step: min(max(base + step, 0), INDEX_MAX), st.sampled_from(EDGES), st.integers(-40, 40)
)
BITS = st.one_of(st.integers(0, 5000), NEAR, st.integers(0, INDEX_MAX))
RANGES = st.one_of(
    st.tuples(st.integers(0, 6000), st.integers(0, 6000)),
    st.builds(lambda start, length: (start, min(start + length, INDEX_MAX)), BITS, st.integers(0, 5000)),
)


def model_runs(model: set[int], start: int, end: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for bit in sorted(bit for bit in model if start <= bit <= end):
        if runs and runs[-1][1] == bit - 1:
            runs[-1] = (runs[-1][0], bit)
        else:
            runs.append((bit, bit))
    return runs


def model_zero(model: set[int], start: int, end: int) -> int:
    at = start
    while at <= end and at in model:
        at += 1
    return min(at, end + 1)


def runs_of(bitmap: XBitmap, start: int = 0, end: int = INDEX_MAX) -> list[tuple[int, int]]:
    firsts, lasts = bitmap.runs(start, end)
    assert firsts.dtype == lasts.dtype == np.uint64
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


class AgainstASet(RuleBasedStateMachine):
    """Every operation, in every order, against a set of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap, self.model = XBitmap(), set[int]()

    @rule(bit=BITS)
    def set_bit(self, bit: int) -> None:
        self.bitmap.set_bit(bit)
        self.model.add(bit)

    @rule(bit=BITS)
    def preload_and_set_bit(self, bit: int) -> None:
        self.bitmap.preload_and_set_bit(bit)
        self.model.add(bit)

    @rule(bit=BITS)
    def clear_bit(self, bit: int) -> None:
        self.bitmap.clear_bit(bit)
        self.model.discard(bit)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def clear_one_that_is_set(self, data: st.DataObject) -> None:
        self.clear_bit(data.draw(st.sampled_from(sorted(self.model))))

    @rule(bits=st.lists(BITS, max_size=60))
    def set_bits(self, bits: list[int]) -> None:
        self.bitmap.set_bits(np.array(bits, dtype=np.uint64))
        self.model.update(bits)

    @rule(base=BITS, step=st.integers(2, 3), count=st.integers(1, 700))
    def set_scattered_bits(self, base: int, step: int, count: int) -> None:
        bits = [bit for bit in range(base, base + step * count, step) if bit <= INDEX_MAX]
        self.set_bits(bits)

    @rule(limits=RANGES)
    def set_run(self, limits: tuple[int, int]) -> None:
        self.bitmap.set_run(*limits)
        self.model.update(range(limits[0], limits[1] + 1))

    @rule(base=BITS, gaps=st.lists(st.integers(2, 1500), min_size=1, max_size=12), length=st.integers(1, 40))
    def set_runs(self, base: int, gaps: list[int], length: int) -> None:
        firsts = [base + sum(gaps[:index]) + length * index for index in range(len(gaps))]
        firsts = [first for first in firsts if first + length - 1 <= INDEX_MAX]
        array = np.array(firsts, dtype=np.uint64)
        self.bitmap.set_runs(array, array + np.uint64(length - 1))
        self.model.update(bit for first in firsts for bit in range(first, first + length))

    @rule(limits=RANGES)
    def clear_bit_range(self, limits: tuple[int, int]) -> None:
        self.bitmap.clear_bit_range(*limits)
        self.model -= set(range(limits[0], limits[1] + 1))

    @rule(start=BITS, end=BITS)
    def clear_bit_range_between_any_two(self, start: int, end: int) -> None:
        self.bitmap.clear_bit_range(start, end)
        self.model = {bit for bit in self.model if not start <= bit <= end}

    @rule(start=BITS, end=BITS)
    def find(self, start: int, end: int) -> None:
        inside = [bit for bit in self.model if start <= bit <= end]
        assert self.bitmap.find_next_set_bit(start, end) == min(inside, default=end + 1)
        assert self.bitmap.find_next_zero_bit(start, end) == model_zero(self.model, start, end)

    @rule(limits=RANGES)
    def walk(self, limits: tuple[int, int]) -> None:
        assert runs_of(self.bitmap, *limits) == model_runs(self.model, *limits)
        assert self.bitmap.bits(*limits).tolist() == sorted(
            bit for bit in self.model if limits[0] <= bit <= limits[1]
        )

    @rule(bit=BITS)
    def test_bit(self, bit: int) -> None:
        assert self.bitmap.test_bit(bit) == (bit in self.model)

    @invariant()
    def leaves_come_and_go_with_their_bits(self) -> None:
        assert self.bitmap.leaves == len({bit // LEAF_BITS for bit in self.model})
        assert self.bitmap.is_empty() == (not self.model)
        assert self.bitmap.count() == len(self.model)
        assert runs_of(self.bitmap) == model_runs(self.model, 0, INDEX_MAX)


TestAgainstASet = AgainstASet.TestCase
TestAgainstASet.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@given(
    st.lists(st.tuples(st.sampled_from(["bit", "preload", "bits", "run"]), BITS, st.integers(0, 3000))),
    st.integers(0, 4),
)
def test_what_fails_for_want_of_leaves_leaves_nothing_behind(
    operations: list[tuple[str, int, int]], leaves_max: int
) -> None:
    """Each operation either happens in full or changes nothing, and the bound holds throughout."""
    bitmap, model = XBitmap(leaves_max=leaves_max), set[int]()
    for what, bit, more in operations:
        last = min(bit + more, INDEX_MAX)
        wanted = set(range(bit, last + 1)) if what == "run" else {bit, last} if what == "bits" else {bit}
        call: dict[str, Any] = {
            "bit": lambda bit=bit: bitmap.set_bit(bit),
            "preload": lambda bit=bit: bitmap.preload_and_set_bit(bit),
            "bits": lambda bit=bit, last=last: bitmap.set_bits(np.array([bit, last], dtype=np.uint64)),
            "run": lambda bit=bit, last=last: bitmap.set_run(bit, last),
        }
        fits = len({item // LEAF_BITS for item in model | wanted}) <= leaves_max
        if fits:
            call[what]()
            model |= wanted
        else:
            with pytest.raises(XBitmapNoMemory if what == "preload" else XBitmapTryAgain):
                call[what]()
        assert set(bitmap.bits().tolist()) == model
        assert bitmap.leaves == len({item // LEAF_BITS for item in model}) <= leaves_max


@pytest.mark.parametrize("bit", EDGES)
def test_one_bit_at_every_edge(bit: int) -> None:
    bitmap = XBitmap()
    bitmap.set_bit(bit)
    assert bitmap.test_bit(bit)
    assert bitmap.find_next_set_bit(0, INDEX_MAX) == bit
    assert bitmap.find_next_set_bit(bit, bit) == bit
    assert bitmap.find_next_zero_bit(bit, bit) == bit + 1
    assert runs_of(bitmap) == [(bit, bit)]
    for neighbour in {max(bit - 1, 0), min(bit + 1, INDEX_MAX)} - {bit}:
        assert not bitmap.test_bit(neighbour)
        assert bitmap.find_next_zero_bit(neighbour, neighbour) == neighbour
    bitmap.clear_bit(bit)
    assert bitmap.is_empty()
    assert bitmap.leaves == 0


def test_a_range_over_many_leaves_is_cut_out_exactly() -> None:
    bitmap = XBitmap()
    bitmap.set_run(500, 10_500)
    bitmap.clear_bit_range(1000, 9000)
    assert runs_of(bitmap) == [(500, 999), (9001, 10_500)]
    assert bitmap.find_next_set_bit(1000, 9000) == 9001
    assert bitmap.find_next_zero_bit(500, 10_500) == 1000
    assert bitmap.leaves == 1 + 3  # bits 500..999; 9001..10500 touch leaves 8, 9 and 10


def test_a_full_number_line_of_leaves_is_refused_before_it_is_built() -> None:
    bitmap = XBitmap()
    with pytest.raises(XBitmapTryAgain):
        bitmap.set_run(0, INDEX_MAX)
    assert bitmap.is_empty()


@pytest.mark.parametrize("bit", [-1, 2**64])
def test_an_index_of_more_than_64_bits_is_refused(bit: int) -> None:
    bitmap = XBitmap()
    for call in (bitmap.set_bit, bitmap.clear_bit, bitmap.test_bit, bitmap.preload_and_set_bit):
        with pytest.raises(ValueError, match="64 bits"):
            call(bit)
    with pytest.raises(ValueError, match="negative"):
        bitmap.set_bits(np.array([5, -1]))
    assert bitmap.is_empty()


# --- what reviewers found in the historic implementation ---------------------------------------------


@pytest.mark.parametrize("bits", [[3], [3, 5000], [3, 64 * 1024]])
def test_historic_bug_a_leaf_without_a_match_is_none_found_not_64_or_1024(bits: list[int]) -> None:
    """A find that starts behind the last bit of a leaf went on with the leaf's width as if it were a hit."""
    bitmap = XBitmap()
    for bit in bits:
        bitmap.set_bit(bit)
    assert bitmap.find_next_set_bit(4, 1023) == 1024  # end + 1, because end is 1023 ...
    assert bitmap.find_next_set_bit(4, 900) == 901  # ... and not the width of anything
    assert bitmap.find_next_set_bit(4, 4000) == 4001
    bitmap.set_run(0, 1023)
    assert bitmap.find_next_zero_bit(0, 900) == 901
    assert bitmap.find_next_zero_bit(0, 63) == 64


def test_historic_bug_hits_behind_the_end_are_not_returned() -> None:
    bitmap = XBitmap()
    bitmap.set_bit(700)
    assert bitmap.find_next_set_bit(0, 699) == 700  # end + 1: which happens to be the bit itself
    assert bitmap.find_next_set_bit(0, 650) == 651
    bitmap.set_run(0, 650)
    assert bitmap.find_next_zero_bit(0, 600) == 601


@pytest.mark.parametrize("width", [64, 1024])
def test_historic_bug_the_first_bit_after_a_word_belongs_to_the_next_one(width: int) -> None:
    """`>` where `>=` was meant: the bit at exactly the word's width was looked for in the wrong word."""
    bitmap = XBitmap()
    bitmap.set_run(0, width - 1)
    assert bitmap.find_next_zero_bit(0, 3 * width) == width
    assert bitmap.find_next_set_bit(width, 3 * width) == 3 * width + 1
    bitmap.set_bit(width)
    assert bitmap.find_next_set_bit(width, 3 * width) == width
    bitmap.clear_bit_range(0, width - 1)
    assert runs_of(bitmap) == [(width, width)]


def test_historic_bug_no_leaf_is_leaked_when_a_set_must_be_tried_again() -> None:
    """The node that had been made for the bit stayed in the tree, empty, for ever."""
    bitmap = XBitmap(leaves_max=1)
    bitmap.set_bit(5)
    with pytest.raises(XBitmapTryAgain):
        bitmap.set_bit(5000)
    with pytest.raises(XBitmapNoMemory):
        bitmap.preload_and_set_bit(5000)
    with pytest.raises(XBitmapNoMemory):
        bitmap.preload()
    assert (bitmap.leaves, runs_of(bitmap)) == (1, [(5, 5)])
    bitmap.clear_bit(5)
    assert bitmap.leaves == 0
    bitmap.preload_and_set_bit(5000)  # the one leaf there is was free again
    assert runs_of(bitmap) == [(5000, 5000)]


def test_a_preloaded_leaf_is_used_by_the_next_set_and_given_back_when_it_was_not_needed() -> None:
    bitmap = XBitmap(leaves_max=2)
    bitmap.preload()
    bitmap.preload()  # one, however often
    assert bitmap.leaves == 1
    bitmap.set_bit(9)
    assert bitmap.leaves == 1
    bitmap.preload_and_set_bit(10)
    assert bitmap.leaves == 1
    bitmap.preload()
    bitmap.preload_end()
    assert bitmap.leaves == 1


def test_historic_bug_the_last_index_does_not_wrap_to_zero() -> None:
    bitmap = XBitmap()
    bitmap.set_bit(INDEX_MAX)
    assert bitmap.find_next_set_bit(0, INDEX_MAX) == INDEX_MAX
    assert bitmap.find_next_set_bit(INDEX_MAX, INDEX_MAX) == INDEX_MAX
    assert bitmap.find_next_zero_bit(INDEX_MAX, INDEX_MAX) == INDEX_MAX + 1
    assert bitmap.find_next_set_bit(0, INDEX_MAX - 1) == INDEX_MAX
    bitmap.set_run(INDEX_MAX - 2000, INDEX_MAX)
    assert runs_of(bitmap) == [(INDEX_MAX - 2000, INDEX_MAX)]
    assert bitmap.find_next_zero_bit(INDEX_MAX - 2000, INDEX_MAX) == INDEX_MAX + 1
    bitmap.clear_bit_range(0, INDEX_MAX - 1)
    assert runs_of(bitmap) == [(INDEX_MAX, INDEX_MAX)]
    bitmap.clear_bit_range(0, INDEX_MAX)
    assert bitmap.is_empty()


def test_an_empty_range_has_nothing_in_it() -> None:
    bitmap = XBitmap()
    bitmap.set_run(0, 100)
    assert bitmap.find_next_set_bit(50, 40) == 41
    assert bitmap.find_next_zero_bit(50, 40) == 41
    bitmap.clear_bit_range(50, 40)
    bitmap.set_run(600, 500)
    assert runs_of(bitmap) == [(0, 100)]
    assert runs_of(bitmap, 50, 40) == []
