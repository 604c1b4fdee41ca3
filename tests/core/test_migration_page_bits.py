"""PageBits behaves like Python's set of ints, whatever its size and wherever words end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migration import page_bits
from migration.errors import LocalProtocolError
from migration.page_bits import PageBits, covers

sizes = st.sampled_from([1, 63, 64, 65, 128, 1000, 4096, 5001])


@st.composite
def sized_runs(draw):
    pages = draw(sizes)
    run = st.tuples(st.integers(0, pages), st.integers(0, 700)).map(lambda r: (r[0], min(r[1], pages - r[0])))
    return pages, draw(st.lists(run, max_size=100))


def arrays(runs):
    return np.array([r[0] for r in runs], np.uint64), np.array([r[1] for r in runs], np.uint64)


def named(runs):
    return {pfn for first, count in runs for pfn in range(first, first + count)}


@given(sized_runs(), st.sampled_from([1, 3, 1 << 14]))
def test_runs_become_members_and_members_runs(given_runs, portion_words) -> None:
    pages, runs = given_runs
    before, page_bits.PORTION_WORDS = page_bits.PORTION_WORDS, portion_words
    try:
        bits = PageBits.of_runs(*arrays(runs), pages)
        members = named(runs)
        assert bits.pfns().tolist() == sorted(members)
        assert bits.count == len(members)
        assert bits.any() == bool(members)
        assert bits.all() == (len(members) == pages)
        assert named(zip(*(column.tolist() for column in bits.runs()), strict=True)) == members
        assert (PageBits.of(bits.mask()).words == bits.words).all()
        windows = [window for window, _ in covers(*arrays(runs), pages)]
        assert all(one.stop <= other.start for one, other in itertools.pairwise(windows))
        assert all(one.stop - one.start <= portion_words for one in windows)
    finally:
        page_bits.PORTION_WORDS = before


@given(sized_runs(), st.randoms())
def test_sets_are_combined_and_changed_like_sets(given_runs, random) -> None:
    pages, runs = given_runs
    half = runs[: len(runs) // 2]
    one, other = PageBits.of_runs(*arrays(half), pages), PageBits.of_runs(*arrays(runs[len(half) :]), pages)
    a, b = named(half), named(runs[len(half) :])
    assert (one | other).pfns().tolist() == sorted(a | b)
    assert (one & other).pfns().tolist() == sorted(a & b)
    assert (one & other.mask()).pfns().tolist() == sorted(a & b)
    assert one.minus(other).pfns().tolist() == sorted(a - b)
    assert (~one).pfns().tolist() == sorted(set(range(pages)) - a)
    changed = one.copy()
    changed.remove_runs(*arrays(runs[len(half) :]))
    assert changed.pfns().tolist() == sorted(a - b)
    assert one.pfns().tolist() == sorted(a)
    smaller = random.randint(0, pages)
    assert one.resized(smaller).pfns().tolist() == sorted(pfn for pfn in a if pfn < smaller)
    assert one.resized(pages + 100).pfns().tolist() == sorted(a)
    assert all((pfn in one) == (pfn in a) for pfn in range(-1, min(pages + 1, 200)))


def test_full_is_every_page_and_no_bit_more() -> None:
    full = PageBits.full(70)
    assert full.all()
    assert full.count == 70
    assert int(full.words[1]) == 0b111111
    assert full.runs()[0].tolist() == [0]
    assert full.runs()[1].tolist() == [70]
    assert not PageBits(0).any()


def test_what_is_counted_at_once_are_not_more_bits_than_32_bits_can_count(monkeypatch) -> None:
    """Neither by the set's own count nor in a window of runs, however large the guest: popcount relies on it."""
    pages = 5 * page_bits.PORTION_WORDS * page_bits.WORD_BITS + 70
    counted = []
    monkeypatch.setattr(page_bits, "popcount", lambda words: counted.append(words.size) or 0)
    assert PageBits(pages, np.zeros(pages // 64 + 1, np.uint64)).count == 0
    windows = [
        window for runs in ([(0, pages)], [(3, pages - 9)]) for window, _ in covers(*arrays(runs), pages)
    ]
    sizes = counted + [window.stop - window.start for window in windows]
    assert max(sizes) == page_bits.PORTION_WORDS
    assert page_bits.PORTION_WORDS * page_bits.WORD_BITS < 1 << 32


def test_numpy_looks_at_it_as_a_mask() -> None:
    bits = PageBits.of_runs(*arrays([(3, 2)]), 8)
    assert np.flatnonzero(bits).tolist() == [3, 4]
    assert np.asarray(bits).dtype == np.bool_


def test_what_lies_beyond_memory_and_sets_of_other_guests_are_refused() -> None:
    with pytest.raises(LocalProtocolError):
        PageBits.of_runs(*arrays([(60, 5)]), 64)
    with pytest.raises(LocalProtocolError):
        PageBits(64) | PageBits(65)
    with pytest.raises(LocalProtocolError):
        PageBits(-1)
