"""A PageSet behaves like Python's set of ints, whatever is done to it in whatever order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from migration import page_set
from migration.errors import LocalProtocolError
from migration.page_set import PageSet

PAGES = 9000  # more than three take windows

pfn_lists = st.lists(st.integers(0, PAGES - 1), max_size=50)
ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(0, 3000)).map(
    lambda r: (r[0], min(r[1], PAGES - r[0]))
)


class PageSetModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.real = PageSet(PAGES)
        self.model: set[int] = set()

    @rule(pfns=pfn_lists)
    def add_pfns(self, pfns) -> None:
        added = self.real.add(np.array(pfns, np.uint64))
        assert added == len(set(pfns) - self.model)
        self.model |= set(pfns)

    @rule(pages=ranges)
    def add_mask(self, pages) -> None:
        mask = np.zeros(PAGES, np.bool_)
        mask[pages[0] : sum(pages)] = True
        added = self.real.add(mask)
        assert added == len(set(range(pages[0], sum(pages))) - self.model)
        self.model |= set(range(pages[0], sum(pages)))

    @rule(pages=ranges)
    def discard_range(self, pages) -> None:
        gone = set(range(pages[0], sum(pages)))
        assert self.real.discard_range(*pages) == len(gone & self.model)
        self.model -= gone

    @rule(runs=st.lists(ranges, max_size=8))
    def discard_runs(self, runs) -> None:
        gone = {pfn for first, count in runs for pfn in range(first, first + count)}
        first = np.array([r[0] for r in runs], np.uint64)
        count = np.array([r[1] for r in runs], np.uint64)
        assert self.real.discard_runs(first, count) == len(gone & self.model)
        self.model -= gone

    @rule(cursor=st.integers(0, PAGES), count=st.integers(0, 400))
    def take(self, cursor, count) -> None:
        expected = sorted(pfn for pfn in self.model if pfn >= cursor)[:count]
        pfns, following = self.real.take(cursor, count)
        assert pfns.dtype == np.uint64
        assert pfns.tolist() == expected
        assert not [
            pfn for pfn in self.model if (expected or [cursor - 1])[-1] < pfn < following and pfn >= cursor
        ]
        assert following >= cursor

    @rule()
    def copies_are_independent(self) -> None:
        copied = self.real.copy()
        copied.discard_range(0, PAGES)
        assert copied.count == 0

    @invariant()
    def same_members(self) -> None:
        assert self.real.count == len(self.real) == len(self.model)
        assert np.flatnonzero(self.real.mask).tolist() == sorted(self.model)


TestPageSetModel = PageSetModel.TestCase


@given(pfn_lists, st.integers(1, 7))
def test_small_portions_add_up_to_everything_in_order(pfns, portion) -> None:
    pages = PageSet(PAGES)
    pages.add(np.array(pfns, np.uint64))
    taken: list[int] = []
    cursor = 0
    while len(taken) < pages.count:
        got, cursor = pages.take(cursor, portion)
        assert 0 < got.size <= portion
        taken += got.tolist()
    assert taken == sorted(set(pfns))
    assert pages.take(cursor, portion)[0].size == 0


def test_taking_thin_members_looks_at_few_windows(monkeypatch) -> None:
    """One member per 1000 pages: the windows must grow, or every portion would cost hundreds of them."""
    mask = np.zeros(1 << 20, np.bool_)
    mask[::1000] = True
    pages = PageSet.of_mask(mask)
    looked_at: list[int] = []
    real_flatnonzero = np.flatnonzero

    def counted(window):
        looked_at.append(window.size)
        return real_flatnonzero(window)

    monkeypatch.setattr(page_set.np, "flatnonzero", counted)
    cursor, taken = 0, 0
    while taken < pages.count:
        pfns, cursor = pages.take(cursor, 256)
        taken += pfns.size
    assert len(looked_at) <= 6 * (pages.count // 256 + 1)
    assert sum(looked_at) <= 4 * mask.size


def test_members_in_range_only() -> None:
    pages = PageSet(10)
    pages.add(np.array([9], np.uint64))
    assert 9 in pages
    assert pages.contains(9)
    assert not pages.contains(10)
    assert not pages.contains(-1)
    assert [array.tolist() for array in pages.runs()] == [[9], [1]]


def test_the_mask_is_a_live_view_that_cannot_be_written() -> None:
    pages = PageSet(10)
    view = pages.mask
    pages.add(np.array([3], np.uint64))
    assert view[3]
    with pytest.raises(ValueError, match="read-only"):
        view[3] = False


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pages: pages.add(np.zeros(11, np.bool_)),
        lambda pages: pages.add(np.array([10], np.uint64)),
        lambda pages: pages.discard_range(5, 6),
        lambda pages: pages.discard_range(-1, 2),
        lambda pages: pages.discard_range(3, -1),
        lambda pages: pages.take(-1, 1),
        lambda _pages: PageSet(-1),
    ],
)
def test_what_is_beyond_memory_is_refused_and_changes_nothing(wrong) -> None:
    pages = PageSet(10)
    pages.add(np.arange(10, dtype=np.uint64))
    with pytest.raises(LocalProtocolError):
        wrong(pages)
    assert pages.count == 10
