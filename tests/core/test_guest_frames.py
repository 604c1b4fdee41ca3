"""The frame table: marking, finding pages again, and what the outside sees of it."""

from collections.abc import Iterator

import numpy as np
import pytest

from guest_agent.boot import BootPage
from guest_agent.frames import OWNER_KERNEL, FrameKind, FrameTable, PageSummary
from guest_agent.ram import GuestRam


@pytest.fixture
def frames() -> Iterator[FrameTable]:
    ram = GuestRam.create(16 << 20)
    table = FrameTable(ram, BootPage.format(ram))
    table.format(reserved_pages=200)
    yield table
    ram.close()


def test_a_new_table_has_the_kernels_pages_and_free_ones(frames: FrameTable) -> None:
    assert (frames.kind[:200] == FrameKind.KERNEL).all()
    assert (frames.kind[200:] == FrameKind.FREE).all()
    assert np.array_equal(frames.pfns_of(OWNER_KERNEL), np.arange(200))


def test_pages_come_back_by_index_not_by_address(frames: FrameTable) -> None:
    frames.mark_pages(np.array([900, 300, 600]), FrameKind.ANON, owner=7, index_first=0)
    frames.mark_pages(np.array([500]), FrameKind.ANON, owner=8, index_first=0)
    assert frames.pfns_of(7).tolist() == [900, 300, 600]
    assert frames.pfns_of(7).dtype == np.uint64
    assert frames.pfns_of(9).size == 0


def test_the_head_of_a_block_stands_for_it(frames: FrameTable) -> None:
    frames.mark_blocks(np.array([1024, 2048]), 10, FrameKind.HELD, owner=7)
    assert frames.pfns_of(7).tolist() == [1024, 2048]
    assert frames.index[1024] == 10
    assert np.array_equal(
        frames.pfns_of_kind(FrameKind.HELD), np.concatenate((np.arange(1024, 2048), np.arange(2048, 3072)))
    )
    frames.clear_blocks(np.array([1024]), 10)
    assert frames.pfns_of(7).tolist() == [2048]
    assert (frames.kind[1024:2048] == FrameKind.FREE).all()


def test_scattered_and_neighbouring_pages_are_marked_alike(frames: FrameTable) -> None:
    scattered = np.arange(201, 4096, 1)[::2]  # beyond the number of runs that are filled one by one
    frames.mark_pages(scattered, FrameKind.CACHE, owner=3, index_first=5)
    assert np.array_equal(frames.pfns_of_kind(FrameKind.CACHE), scattered)
    assert frames.index[scattered[0]] == 5
    frames.clear_blocks(scattered, 0)
    assert not frames.kind[200:].any()


def test_the_summary_tells_the_four_kinds_apart_and_is_a_copy(frames: FrameTable) -> None:
    for pfn, kind in (
        (300, FrameKind.ANON),
        (301, FrameKind.CACHE),
        (302, FrameKind.BALLOON),
        (303, FrameKind.HELD),
    ):
        frames.mark_pages(np.array([pfn]), kind, owner=1, index_first=0)
    summary = frames.summary()
    expected = [PageSummary.USED, PageSummary.USED, PageSummary.BALLOONED, PageSummary.HELD, PageSummary.FREE]
    assert summary[300:305].tolist() == expected
    assert summary.dtype == np.uint8
    assert summary.shape == (4096,)
    summary[:] = 9
    assert frames.kind[300] == FrameKind.ANON
