"""Runs of single pages: what is taken as runs is what is taken page by page, and any part of it can be freed."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest_agent.arrays import expand_runs
from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.frames import OWNER_BALLOON, FrameKind, FrameTable
from guest_agent.page_runs import alloc_runs, free_runs, joined, pages_in, runs_of_pages
from guest_agent.ram import GuestRam

MEMORY_BYTES = 64 << 20


@pytest.fixture(name="buddy")
def fixture_buddy() -> Iterator[BuddyAllocator]:
    ram = GuestRam.create(MEMORY_BYTES)
    boot = BootPage.format(ram)
    yield BuddyAllocator(ram, boot, FrameTable(ram, boot))
    ram.close()


@given(
    wanted=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    holes=st.integers(0, 3000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_runs_are_pages_of_their_own(wanted: list[int], holes: int, seed: int) -> None:
    ram = GuestRam.create(MEMORY_BYTES)
    boot = BootPage.format(ram)
    frames = FrameTable(ram, boot)
    buddy = BuddyAllocator(ram, boot, frames)
    generator = np.random.default_rng(seed)
    if holes:  # fragmented memory: something is used here and there
        taken = buddy.alloc_bulk(buddy.free_pages, kind=FrameKind.ANON, owner=1)
        buddy.free_bulk(generator.permutation(taken)[holes:])
    free = buddy.free_pages
    mine: list[int] = []
    for count in wanted:
        available = max(0, buddy.free_pages - buddy.reserve_pages)
        runs = alloc_runs(buddy, count, kind=FrameKind.BALLOON, owner=OWNER_BALLOON)
        assert pages_in(runs) == min(count, available)
        assert (runs[0][1:] >= runs[1][:-1]).all(), "ascending and disjoint"
        mine += expand_runs(*runs).tolist()
    assert len(mine) == len(set(mine)) == free - buddy.free_pages
    assert sorted(mine) == np.flatnonzero(frames.owner == OWNER_BALLOON).tolist()
    assert sorted(mine) == np.flatnonzero(frames.kind == FrameKind.BALLOON).tolist()
    shuffled = generator.permutation(np.array(mine, dtype=np.uint64))
    cut = len(mine) // 3
    for part in (shuffled[:cut], shuffled[cut:]):  # each page may go by itself
        free_runs(buddy, runs_of_pages(part))
        assert buddy.check() == []
    assert buddy.free_pages == free
    ram.close()


def test_whole_memory_comes_back_as_its_largest_blocks(buddy: BuddyAllocator) -> None:
    blocks = list(buddy.walk_free_blocks())
    runs = alloc_runs(buddy, buddy.free_pages, kind=FrameKind.BALLOON, owner=OWNER_BALLOON)
    assert pages_in(runs) > 0.9 * buddy.pages
    free_runs(buddy, joined(runs))
    assert list(buddy.walk_free_blocks()) == blocks
    assert buddy.check() == []


def test_a_page_is_not_freed_twice(buddy: BuddyAllocator) -> None:
    runs = alloc_runs(buddy, 3000, kind=FrameKind.BALLOON, owner=OWNER_BALLOON)
    free_runs(buddy, runs)
    with pytest.raises(AssertionError):
        free_runs(buddy, runs)
