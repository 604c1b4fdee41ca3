"""Pfns, runs and masks are three spellings of one set, and converting between them loses nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration.errors import LocalProtocolError
from migration.pages import SPAN_PAGES_PER_RUN, mask_runs, merge_runs, pfns_of, runs_of, set_runs, windows_of

PAGES = 6000

masks = st.lists(st.booleans(), max_size=200).map(lambda bits: np.array(bits, np.bool_))
# Ranges that may overlap, repeat, be empty and lie in any order; near ones and far ones.
ranges = st.lists(
    st.tuples(st.integers(0, PAGES - 1), st.integers(0, 40)).map(lambda r: (r[0], min(r[1], PAGES - r[0]))),
    max_size=30,
)


def arrays(runs):
    return np.array([r[0] for r in runs], np.uint64), np.array([r[1] for r in runs], np.uint64)


def painted(runs):
    mask = np.zeros(PAGES, np.bool_)
    for first, count in runs:
        mask[first : first + count] = True
    return mask


@given(masks)
def test_mask_to_runs_to_pfns_and_back(mask) -> None:
    first, count = mask_runs(mask)
    pfns = pfns_of(first, count)
    assert pfns.tolist() == np.flatnonzero(mask).tolist()
    again_first, again_count = runs_of(pfns)
    assert again_first.tolist() == first.tolist()
    assert again_count.tolist() == count.tolist()
    assert (first.dtype, count.dtype, pfns.dtype) == (np.uint64, np.uint32, np.uint64)


def test_pfns_need_not_be_small() -> None:
    assert pfns_of(np.array([2**63], np.uint64), np.array([2], np.uint32)).tolist() == [2**63, 2**63 + 1]


@given(ranges)
def test_merged_runs_are_disjoint_ascending_and_cover_the_same_pages(runs) -> None:
    begin, end = merge_runs(*arrays(runs), pages=PAGES)
    assert (end > begin).all()
    assert (begin[1:] > end[:-1]).all(), "runs that touch must be one"
    assert (painted(zip(begin.tolist(), (end - begin).tolist(), strict=True)) == painted(runs)).all()


@given(ranges)
def test_windows_name_every_page_once(runs) -> None:
    times_named = np.zeros(PAGES, np.int64)
    for window, covered in windows_of(*arrays(runs), pages=PAGES):
        times_named[window] += 1 if covered is None else covered
    assert (times_named == painted(runs)).all()


@given(ranges, st.booleans())
def test_set_runs_equals_painting_one_by_one(runs, value) -> None:
    mask = np.full(PAGES, not value)
    set_runs(mask, *arrays(runs), value)
    assert (mask == (painted(runs) == value)).all()


def test_both_ways_of_cutting_windows_are_in_use() -> None:
    near = arrays([(0, 1), (2, 1), (4, 1)])
    far = arrays([(0, 1), (10 * SPAN_PAGES_PER_RUN, 1)])
    assert [covered is None for _, covered in windows_of(*near, pages=PAGES)] == [False]
    assert [covered is None for _, covered in windows_of(*far, pages=PAGES)] == [True, True]


@pytest.mark.parametrize(
    ("first", "count"),
    [(PAGES, 1), (PAGES - 1, 2), (0, PAGES + 1), (2**64 - 1, 1), (1, 2**64 - 1), (2**63, 2**63)],
)
def test_a_run_beyond_memory_is_refused_even_where_its_end_wraps(first, count) -> None:
    with pytest.raises(LocalProtocolError, match="beyond"):
        merge_runs(np.array([first], np.uint64), np.array([count], np.uint64), pages=PAGES)


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="unequal"):
        merge_runs(np.zeros(2, np.uint64), np.zeros(1, np.uint64), pages=PAGES)
