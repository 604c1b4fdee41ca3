"""Several streams into one memory: each has its own numbers, and a page comes by its own stream or not at all."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dest_node.page_receiver import PageReceiver
from host.guest_memory import HostRam
from migration.codec import ZERO_PAGE_HASH, ChunkHeader, encode_chunk, page_hashes
from migration.errors import RemoteProtocolError
from migration.pages import PAGE_BYTES, runs_of
from migration.partition import BLOCK_PAGES, check_partition, pages_by_stream

PAGES = 6 * BLOCK_PAGES
PATIENCE_S = 10.0


@pytest.fixture
def receiver():
    receiver = PageReceiver(HostRam.create(PAGES * PAGE_BYTES), attempt=1, streams=2)
    yield receiver
    receiver.ram.close()


def chunk(receiver, stream, sequence, pfns, *, zero=False):
    first, count = runs_of(np.array(pfns, np.uint64))
    none = np.empty(0, np.uint64), np.empty(0, np.uint32)
    data = b"" if zero else os.urandom(len(pfns) * PAGE_BYTES)
    header = ChunkHeader(receiver.incarnation, 1, 1, sequence, stream)
    runs = (*none, first, count) if zero else (first, count, *none)
    return encode_chunk(header, *runs, page_hashes(data), data)


def opened(receiver):
    return receiver.begin_stream(lambda: None)


@pytest.fixture
def punched(receiver, monkeypatch):
    """The runs that were punched, in order."""
    runs, punch = [], receiver.ram.punch

    def noted(first, count):
        runs.append((first, count))
        punch(first, count)

    monkeypatch.setattr(receiver.ram, "punch", noted)
    return runs


def test_a_page_that_is_zero_now_is_punched_once_and_one_that_always_was_costs_nothing(
    receiver, punched
) -> None:
    stream = opened(receiver)
    receiver.store(stream, chunk(receiver, 0, 0, [3, 4, 7]))
    receiver.store(stream, chunk(receiver, 0, 1, [2, 3, 4, 5, 7], zero=True))
    assert punched == [(3, 2), (7, 1)]
    assert not receiver.ram.populated().any()
    assert (receiver.stored_hashes[[2, 3, 4, 5, 7]] == ZERO_PAGE_HASH).all()
    assert not receiver.stored_hashes[[0, 1, 6]].any(), "no chunk named them"
    receiver.store(stream, chunk(receiver, 0, 2, [3, 4], zero=True))
    assert len(punched) == 2, "it is known that they are zero"
    receiver.store(stream, chunk(receiver, 0, 3, [4]))
    receiver.store(stream, chunk(receiver, 0, 4, [4], zero=True))
    assert punched[2:] == [(4, 1)]


def test_what_does_not_read_back_as_it_was_stored_is_found(receiver) -> None:
    stream = opened(receiver)
    receiver.store(stream, chunk(receiver, 0, 0, [1, 3, 4]))
    receiver.store(stream, chunk(receiver, 0, 1, [4, 9], zero=True))
    found = receiver.ram.hash_pages()
    assert receiver.difference(found) is None
    for pfn, value in ((3, ZERO_PAGE_HASH), (4, found[3]), (5, found[3]), (9, found[1])):
        wrong = found.copy()
        wrong[pfn] = value
        assert receiver.difference(wrong) == pfn


@given(st.sets(st.integers(0, PAGES - 1)), st.integers(1, 5))
def test_every_page_has_one_stream_and_both_sides_agree(pages, streams) -> None:
    pfns = np.array(sorted(pages), np.uint64)
    parts = pages_by_stream(pfns, streams)
    assert sorted(np.concatenate(parts).tolist()) == pfns.tolist()
    for stream, part in enumerate(parts):
        run_first, run_pages = runs_of(part)
        check_partition(run_first, run_pages, stream=stream, streams=streams)
        if streams > 1 and part.size:
            with pytest.raises(RemoteProtocolError, match="another stream"):
                check_partition(run_first, run_pages, stream=(stream + 1) % streams, streams=streams)


def test_streams_have_numbers_of_their_own(receiver) -> None:
    first, second = opened(receiver), opened(receiver)
    receiver.store(second, chunk(receiver, 1, 0, [BLOCK_PAGES]))
    receiver.store(first, chunk(receiver, 0, 0, [0, 1]))
    receiver.store(first, chunk(receiver, 0, 1, [2 * BLOCK_PAGES]))
    assert (receiver.stored_below, receiver.stored_chunks) == ([2, 1], 3)
    with pytest.raises(RemoteProtocolError, match="sequence"):
        receiver.store(second, chunk(receiver, 1, 2, [BLOCK_PAGES]))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("pfns", [[BLOCK_PAGES], [0, BLOCK_PAGES], [BLOCK_PAGES - 1, BLOCK_PAGES]])
def test_a_page_of_another_stream_is_refused_and_nothing_of_its_chunk_is_stored(receiver, pfns, zero) -> None:
    stream = opened(receiver)
    with pytest.raises(RemoteProtocolError, match="another stream"):
        receiver.store(stream, chunk(receiver, 0, 0, pfns, zero=zero))
    assert receiver.stored_below == [0, 0]
    assert not receiver.stored_hashes.any()
    assert not receiver.ram.populated().any()


def test_a_call_is_one_stream_and_a_stream_one_call(receiver) -> None:
    first, second = opened(receiver), opened(receiver)
    with pytest.raises(RemoteProtocolError, match="already"):
        opened(receiver)
    receiver.store(first, chunk(receiver, 0, 0, [0]))
    with pytest.raises(RemoteProtocolError, match="another stream"):
        receiver.store(first, chunk(receiver, 1, 0, [BLOCK_PAGES]))
    for taken_or_missing in (0, 2):
        with pytest.raises(RemoteProtocolError, match="no such page stream"):
            receiver.store(second, chunk(receiver, taken_or_missing, 0, [0]))
    receiver.end_stream(first)
    receiver.store(second, chunk(receiver, 0, 1, [1]))


def test_joining_waits_for_every_stream_and_new_calls_go_on_behind_them(receiver) -> None:
    cut = []
    old = [receiver.begin_stream(lambda i=i: cut.append(i)) for i in range(2)]
    for index, stream in enumerate(old):
        receiver.store(stream, chunk(receiver, index, 0, [index * BLOCK_PAGES]))
    joined = threading.Event()
    with receiver._lanes[1].storing:
        assert not receiver.join_streams(0.01)
        threading.Thread(target=lambda: receiver.join_streams(PATIENCE_S) and joined.set()).start()
        assert not joined.is_set()
    assert joined.wait(PATIENCE_S)
    assert sorted(cut) == [0, 1]
    for index, stream in enumerate(old):
        with pytest.raises(RemoteProtocolError, match="given up"):
            receiver.store(stream, chunk(receiver, index, 1, [index * BLOCK_PAGES + 1]))
    new = opened(receiver)
    receiver.store(new, chunk(receiver, 1, 1, [BLOCK_PAGES + 1]))
    assert receiver.stored_below == [1, 2]
    assert receiver.join(PATIENCE_S)
    with pytest.raises(RemoteProtocolError):
        receiver.store(new, chunk(receiver, 1, 2, [BLOCK_PAGES + 2]))
