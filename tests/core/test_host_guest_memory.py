"""Guest RAM on a host: what is read is what is there, and looking never allocates."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.errors import GuestMemoryError
from host.guest_memory import HASH_BUFFER_PAGES, HostRam
from migration.codec import ZERO_PAGE_HASH, page_hashes
from migration.pages import PAGE_BYTES

PAGES = 64


def u64(*values):
    return np.array(values, dtype=np.uint64)


def random_pages(count, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), dtype=np.uint8)


def allocated_pages(ram):
    return os.fstat(ram.fd).st_blocks * 512 // PAGE_BYTES


@pytest.fixture
def ram():
    made = HostRam.create(PAGES * PAGE_BYTES)
    yield made
    made.close()


def test_fresh_ram_is_all_holes_and_hashes_as_zero(ram):
    assert not ram.populated().any()
    assert (ram.hash_pages() == ZERO_PAGE_HASH).all()
    assert allocated_pages(ram) == 0


def test_what_was_stored_is_gathered(ram):
    data = random_pages(5)
    ram.store(u64(3, 60), u64(1, 4), data.reshape(-1).data)
    out = np.empty((5, PAGE_BYTES), np.uint8)
    ram.gather(u64(3, 60, 61, 62, 63), out.reshape(-1).data)
    assert (out == data).all()
    assert np.flatnonzero(ram.populated()).tolist() == [3, 60, 61, 62, 63]
    assert (ram.pages_view[60] == data[1]).all()
    assert ram.words.shape == (PAGES, 512)


@pytest.mark.parametrize("pfns", [(0, 1, 2), (9, 3, 4, 20), (9,), (63, 9, 62)])
def test_gathering_holes_gives_zeros_and_allocates_nothing(ram, pfns):
    data = random_pages(1)
    ram.store(u64(9), u64(1), data.reshape(-1).data)
    out = np.full((len(pfns), PAGE_BYTES), 0xAA, np.uint8)
    ram.gather(u64(*pfns), out.reshape(-1).data)
    for row, pfn in zip(out, pfns, strict=True):
        assert (row == (data[0] if pfn == 9 else 0)).all()
    assert allocated_pages(ram) == 1


def test_hashing_allocates_nothing_and_spans_buffers():
    count = 2 * HASH_BUFFER_PAGES + 3  # one extent longer than the buffer, and what is left over
    ram = HostRam.create((count + 10) * PAGE_BYTES)
    data = random_pages(count)
    ram.store(u64(7), u64(count), data.reshape(-1).data)
    hashes = ram.hash_pages()
    assert (hashes[7 : 7 + count] == page_hashes(data)).all()
    assert (np.delete(hashes, np.arange(7, 7 + count)) == ZERO_PAGE_HASH).all()
    assert allocated_pages(ram) == count
    ram.close()


def test_an_allocated_page_of_zeros_hashes_like_a_hole(ram):
    ram.store(u64(5), u64(1), memoryview(bytes(PAGE_BYTES)))
    assert ram.populated()[5]
    assert ram.hash_pages()[5] == ZERO_PAGE_HASH


def test_punched_pages_are_holes_again(ram):
    ram.store(u64(0), u64(PAGES), random_pages(PAGES).reshape(-1).data)
    ram.punch(10, 5)
    assert np.flatnonzero(~ram.populated()).tolist() == [10, 11, 12, 13, 14]
    assert allocated_pages(ram) == PAGES - 5
    ram.zero_all()
    assert allocated_pages(ram) == 0
    assert os.fstat(ram.fd).st_size == PAGES * PAGE_BYTES


@pytest.mark.parametrize(
    ("first", "count"),
    [(PAGES, 1), (PAGES - 1, 2), (0, PAGES + 1), (2**64 - 1, 1), (2**64 - 1, 2), (1, 2**64 - 1)],
)
def test_a_run_outside_ram_stores_nothing(ram, first, count):
    with pytest.raises(GuestMemoryError):
        ram.store(u64(0, first), u64(1, count), memoryview(bytes(PAGE_BYTES)))
    assert allocated_pages(ram) == 0


def test_data_that_is_not_the_runs_pages_stores_nothing(ram):
    with pytest.raises(GuestMemoryError, match="8192 bytes for 1 pages"):
        ram.store(u64(0), u64(1), memoryview(bytes(2 * PAGE_BYTES)))
    assert allocated_pages(ram) == 0


@pytest.mark.parametrize(("first", "pages"), [(-1, 1), (PAGES, 1), (0, PAGES + 1), (1, -1)])
def test_punching_outside_ram_is_refused(ram, first, pages):
    with pytest.raises(GuestMemoryError):
        ram.punch(first, pages)


def test_gathering_outside_ram_is_an_error_and_not_another_page(ram):
    with pytest.raises(GuestMemoryError):
        ram.gather(u64(PAGES), memoryview(bytearray(PAGE_BYTES)))


def test_views_are_of_pages_that_are_there_and_make_none(ram):
    data = bytes(range(256)) * (PAGE_BYTES // 256) * 4
    ram.store(u64(0, 5), np.array([3, 1], np.uint32), memoryview(data))
    count = np.array([3, 1], np.uint32)
    views = ram.resident_views(u64(0, 5), count)
    assert b"".join(views) == data
    assert ram.resident_views(u64(2), np.array([2], np.uint32)) is None
    ram.punch(1, 1)
    assert ram.resident_views(u64(0, 5), count) is None
    assert allocated_pages(ram) == 3
    with pytest.raises(GuestMemoryError):
        ram.resident_views(u64(PAGES), np.array([1], np.uint32))


@pytest.mark.parametrize("memory_bytes", [0, -PAGE_BYTES, PAGE_BYTES + 1, 2 * PAGE_BYTES])
def test_a_file_that_cannot_be_guest_ram_is_refused(memory_bytes):
    fd = os.memfd_create("short")
    os.ftruncate(fd, PAGE_BYTES)
    with pytest.raises(GuestMemoryError):
        HostRam(fd, memory_bytes)
    os.close(fd)


@settings(max_examples=60, deadline=None)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["store", "punch"]),
            st.integers(0, PAGES - 1),
            st.integers(1, 12),
            st.integers(0, 2**32),
        ),
        max_size=12,
    ),
    wanted=st.lists(st.integers(0, PAGES - 1), unique=True).map(sorted),
)
def test_any_sequence_of_stores_and_punches_reads_like_an_array(operations, wanted):
    ram = HostRam.create(PAGES * PAGE_BYTES)
    model = np.zeros((PAGES, PAGE_BYTES), np.uint8)
    for kind, first, length, seed in operations:
        count = min(length, PAGES - first)
        if kind == "store":
            model[first : first + count] = random_pages(count, seed)
            ram.store(u64(first), u64(count), model[first : first + count].reshape(-1).data)
        else:
            model[first : first + count] = 0
            ram.punch(first, count)
    before = allocated_pages(ram)
    out = np.full((len(wanted), PAGE_BYTES), 0xAA, np.uint8)
    ram.gather(np.array(wanted, np.uint64), out.reshape(-1).data)
    assert (out == model[wanted]).all()
    assert (ram.hash_pages() == page_hashes(model)).all()
    assert allocated_pages(ram) == before
    ram.close()
