"""What the page reader makes of live RAM: messages that say exactly what RAM held, each page once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.guest_memory import HostRam
from migration.codec import CHUNK_PAGES_MAX, ZERO_PAGE_HASH, decode_chunk, page_hashes, verify
from migration.pages import PAGE_BYTES, pfns_of
from source_node.page_reader import ChunkNumbers, PageReader

PAGES = 2 * CHUNK_PAGES_MAX + 40


@pytest.fixture(scope="module")
def ram():
    """Random pages, except: every seventh is written but zero, and 100..139 are holes."""
    ram = HostRam.create(PAGES * PAGE_BYTES)
    content = np.random.default_rng(5).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    content[::7] = 0
    ram.store(
        np.array([0, 140], np.uint64),
        np.array([100, PAGES - 140], np.uint64),
        np.delete(content, range(100, 140), axis=0).reshape(-1).data,
    )
    yield ram
    ram.close()


def content_of(ram):
    data = bytearray(PAGES * PAGE_BYTES)
    ram.gather(np.arange(PAGES, dtype=np.uint64), memoryview(data))
    return np.frombuffer(data, np.uint8).reshape(PAGES, PAGE_BYTES)


def reader_of(ram, *, detects_zero):
    reader = PageReader(ram, incarnation="3f2a", attempt=1, detects_zero=detects_zero)
    reader.find_holes()
    return reader


PFNS = st.one_of(
    st.sets(st.integers(0, PAGES - 1), max_size=PAGES).map(sorted),
    st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES)).map(
        lambda run: list(range(run[0], min(sum(run), PAGES)))
    ),
)


@settings(deadline=None)
@given(pfns=PFNS, detects_zero=st.booleans(), round_index=st.integers(1, 2))
def test_chunks_say_what_ram_holds(ram, pfns, detects_zero, round_index) -> None:
    content = content_of(ram)
    reader = reader_of(ram, detects_zero=detects_zero)
    seen = []
    chunks = list(reader.chunks_of(ChunkNumbers(0), round_index, np.array(pfns, np.uint64)))
    for sequence, outgoing in enumerate(chunks):
        chunk = decode_chunk(outgoing.message, pages=PAGES)
        verify(chunk)
        assert (chunk.header.sequence, chunk.header.round_index) == (sequence, round_index)
        assert (outgoing.data_pages, outgoing.zero_pages) == (chunk.data_page_count, chunk.zero_page_count)
        data_pfns, zero_pfns = (
            pfns_of(chunk.run_first, chunk.run_pages),
            pfns_of(chunk.zero_first, chunk.zero_pages),
        )
        assert bytes(chunk.data) == content[data_pfns].tobytes()
        assert not content[zero_pfns].any()
        if detects_zero:
            assert content[data_pfns].any(axis=1).all(), "a zero page was sent as data"
        else:
            assert not zero_pfns.size
        seen += [*data_pfns.tolist(), *zero_pfns.tolist()]
    assert sorted(seen) == pfns
    expected = np.zeros(PAGES, np.uint64)
    expected[pfns] = page_hashes(content[pfns])
    assert (reader.sent_hashes == expected).all()


def test_no_hole_is_allocated_by_reading_it(ram) -> None:
    before = ram.populated()
    for detects_zero in (False, True):
        list(
            reader_of(ram, detects_zero=detects_zero).chunks_of(
                ChunkNumbers(0), 1, np.arange(PAGES, dtype=np.uint64)
            )
        )
    assert (ram.populated() == before).all()
    assert np.flatnonzero(~before).tolist() == list(range(100, 140))


def test_a_message_is_private(ram) -> None:
    """What the guest writes after a page was read is in no message, and not in the next one's buffer either."""
    reader = reader_of(ram, detects_zero=False)
    (chunk,) = reader.chunks_of(ChunkNumbers(0), 1, np.array([1], np.uint64))
    before = bytes(chunk.message)
    original = bytes(ram.memory[PAGE_BYTES : 2 * PAGE_BYTES])
    ram.memory[PAGE_BYTES : 2 * PAGE_BYTES] = bytes(PAGE_BYTES)
    try:
        (later,) = reader.chunks_of(ChunkNumbers(0), 1, np.array([1], np.uint64))
        assert chunk.message == before
        assert int(reader.sent_hashes[1]) == ZERO_PAGE_HASH
        assert not any(decode_chunk(later.message, pages=PAGES).data)
    finally:
        ram.memory[PAGE_BYTES : 2 * PAGE_BYTES] = original
