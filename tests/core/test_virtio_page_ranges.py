"""Buffers and page numbers as sets of runs, against plain Python sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from virtio.balloon_stats import (
    STATS_BYTES_MAX,
    STATS_ENTRIES_MAX,
    STATS_NAMES,
    STATS_TAGS,
    decode_stats,
    encode_stats,
)
from virtio.page_ranges import merged, runs_of_pfns, whole_pages

PAGE = 4096
FIRST, END = 8, 64
EDGES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 2**32, 2**63, 2**64 - 1, 2**64 - PAGE, END * PAGE, END * PAGE - 1]
NUMBERS = st.one_of(st.integers(0, (END + 4) * PAGE), st.sampled_from(EDGES))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40))
def test_whole_pages_are_those_a_plain_loop_finds(buffers):
    covered = whole_pages(buffers, FIRST, END)
    expected, outside, partial = set(), 0, 0
    for address, length in buffers:
        if address < FIRST * PAGE or address + length > END * PAGE:
            outside += 1
            continue
        partial += bool(address % PAGE or length % PAGE)
        expected |= {
            pfn for pfn in range(END) if pfn * PAGE >= address and (pfn + 1) * PAGE <= address + length
        }
    assert (covered.outside, covered.partial) == (outside, partial)
    runs = merged(covered.first, covered.count)
    assert set(runs.pfns.tolist()) == expected
    assert runs.pages == len(expected)
    ends = runs.first + runs.count
    assert (runs.first[1:] > ends[:-1]).all(), "runs neither overlap nor touch"


@given(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 30)))
def test_page_numbers_become_runs(pfns):
    runs = runs_of_pfns(np.array(pfns, np.uint32), rejected=3)
    assert runs.pfns.tolist() == sorted(set(pfns))
    assert (runs.first[1:] > (runs.first + runs.count)[:-1]).all()
    assert runs.rejected == 3


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2**64 - 1)), max_size=40), st.binary(max_size=9))
def test_statistics_are_the_last_value_of_every_known_tag(entries, rest):
    stats = decode_stats(encode_stats(entries) + rest)
    assert stats.values == {STATS_NAMES[tag]: value for tag, value in entries if tag < 16}
    assert stats.unknown_tags == sum(tag >= 16 for tag, _ in entries)
    assert stats.leftover_bytes == len(rest)


def test_the_tags_are_the_standards():
    assert [STATS_TAGS[name] for name in ("swap_in", "memfree", "memtot", "avail", "htlb_pgfail")] == [
        0,
        4,
        5,
        6,
        9,
    ]
    assert STATS_TAGS["direct_reclaim"] == 15
    assert encode_stats([(4, 0x0102030405060708)]) == b"\x04\x00\x08\x07\x06\x05\x04\x03\x02\x01"


def test_no_more_statistics_are_read_than_fit():
    stats = decode_stats(encode_stats([(0xFFFF, 1)] * 10_000))
    assert stats.unknown_tags == STATS_ENTRIES_MAX == STATS_BYTES_MAX // 10
