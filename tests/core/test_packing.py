"""Compression and deltas: what was packed comes out page by page as it was, and nothing that arrives can harm."""

import tracemalloc

import lz4.block
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migration import delta
from migration.codec import (
    UNPACKED,
    ChunkHead,
    ChunkHeader,
    Packing,
    chunk_hash,
    decode_chunk,
    encode_chunk,
    page_hashes,
    verify,
)
from migration.compression import PAUSE_CHUNKS_MIN, TRIES_MAX, Compressor, decompress
from migration.delta import DELTA_BYTES_MAX, PAGE_WORDS, SPANS_MAX
from migration.errors import RemoteProtocolError
from migration.packing import pack, unpack
from migration.pages import PAGE_BYTES, runs_of
from migration.pb.migration_pb2 import ENCODING_LZ4, ENCODING_RAW, ENCODING_ZSTD, PageChunk
from source_node.delta_cache import DeltaCache, no_slots
from source_node.packer import Packer, PackingOrder, packers, report

PAGES = 4096
ENCODINGS = {"lz4": ENCODING_LZ4, "zstd": ENCODING_ZSTD}
NONE_U64, NONE_U32 = np.empty(0, np.uint64), np.empty(0, np.uint32)
# A busy machine decides nothing: neither how long an example took, nor how long it took to draw it.
UNHURRIED = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS = pytest.mark.parametrize("kind", ["none", "lz4", "zstd"])


def random_pages(count, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


def text_pages(count):
    row = np.frombuffer((b"all work and no play makes a dull page " * 120)[:PAGE_BYTES], np.uint8)
    return np.tile(row, (count, 1))


def message_of(pfns, pages, packing, data, sequence=0):
    run_first, run_pages = runs_of(np.array(pfns, np.uint64))
    header = ChunkHeader("3f2a", 1, 2, sequence)
    parts = (header, run_first, run_pages, NONE_U64, NONE_U32, page_hashes(pages), data, packing)
    return encode_chunk(*parts)


def received(message, older=None):
    """What a destination makes of it that has `older` (PAGES, 4096) stored."""

    def read(pfns, out):
        out[:] = older[pfns].reshape(-1).data

    chunk = decode_chunk(message, pages=PAGES)
    if chunk.packing is not UNPACKED:
        chunk = unpack(chunk, read)
    verify(chunk)
    return np.frombuffer(chunk.data, np.uint8).reshape(-1, PAGE_BYTES)


# --- deltas -------------------------------------------------------------------------------------------


@st.composite
def changes(draw, pages_max=6):
    """Pages, each with the words that change in it."""
    words = st.one_of(
        st.sets(st.integers(0, PAGE_WORDS - 1), max_size=40),
        st.tuples(st.integers(0, PAGE_WORDS), st.integers(0, PAGE_WORDS)).map(lambda two: set(range(*two))),
        st.sampled_from([set(), {0}, {PAGE_WORDS - 1}, {0, PAGE_WORDS - 1}, set(range(PAGE_WORDS))]),
    )
    return draw(st.lists(words, min_size=1, max_size=pages_max))


def changed_pages(older, changes):
    newer = older.copy()
    for page, words in zip(newer.view(np.uint64), changes, strict=True):
        page[sorted(words)] ^= np.uint64(0x0100)
    return newer


def encoded(newer, older, gap=0):
    places = np.arange(gap, gap + len(newer))
    return delta.encode(places, newer.view(np.uint64), older.view(np.uint64))


def pays(words):
    """Whether a page with these changed words goes as a delta, word by word."""
    spans = sum(word - 1 not in words for word in words)
    return spans <= SPANS_MAX and 8 * len(words) + 4 * spans + 4 <= DELTA_BYTES_MAX


@UNHURRIED
@given(changes(), st.integers(0, 3))
def test_a_delta_applied_to_the_older_version_is_the_page(changes, gap) -> None:
    older = random_pages(len(changes))
    newer = changed_pages(older, changes)
    deltas, words, saved = encoded(newer, older, gap)
    field = deltas.to_bytes()
    places = deltas.places - gap
    assert places.tolist() == [page for page, words in enumerate(changes) if pays(words)]
    assert saved == places.size * PAGE_BYTES - (len(field) - 4) - words.nbytes
    if not places.size:
        return
    parsed = delta.parse(field, data_pages=len(changes) + gap)
    assert parsed.places.tolist() == deltas.places.tolist()
    assert parsed.word_count == words.size
    pages = older[places].view(np.uint64).copy()
    delta.apply(parsed, pages, words)
    assert (pages.view(np.uint8) == newer[places]).all()


@UNHURRIED
@given(changes(), st.data())
def test_a_changed_delta_field_is_refused_or_stays_inside_its_pages(changes, data) -> None:
    older = random_pages(len(changes))
    deltas, _, _ = encoded(changed_pages(older, changes), older)
    field = bytearray(deltas.to_bytes())
    at = data.draw(st.integers(0, len(field) - 1))
    field[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(field)))
    for broken in (bytes(field), bytes(field[:cut])):
        try:
            parsed = delta.parse(broken, data_pages=len(changes))
        except RemoteProtocolError:
            continue
        pages = np.zeros((parsed.places.size, PAGE_WORDS), np.uint64)
        delta.apply(parsed, pages, np.ones(parsed.word_count, np.uint64))
        assert int(pages.sum()) == parsed.word_count, "every word of its own"


@UNHURRIED
@given(st.binary(max_size=64), st.integers(0, 8))
def test_garbage_is_no_delta(garbage, data_pages) -> None:
    try:
        parsed = delta.parse(garbage, data_pages=data_pages)
    except RemoteProtocolError:
        return
    assert parsed.places.size <= data_pages
    assert parsed.word_count <= data_pages * PAGE_WORDS


def columns(*values):
    return np.array([1], "<u4").tobytes() + np.array(values, "<u2").tobytes()


@pytest.mark.parametrize(
    "field",
    [
        columns(0, 1, 0, 0),  # an empty span
        columns(0, 1, PAGE_WORDS, 1),
        columns(0, 1, PAGE_WORDS - 1, 2),
        columns(0, 2, 5, 4, 1, 1),  # going back
        columns(0, 2, 5, 6, 2, 1),  # overlapping
        columns(1, 1, 0, 1),  # of a page that the chunk has not
        columns(0, 2, 0, 1),  # a span too few
        columns(0, SPANS_MAX + 1, *range(0, 2 * SPANS_MAX + 2, 2), *[1] * (SPANS_MAX + 1)),
        np.array([2**32 - 1], "<u4").tobytes(),
    ],
)
def test_impossible_deltas_are_refused(field) -> None:
    with pytest.raises(RemoteProtocolError):
        delta.parse(field, data_pages=1)


# --- packed chunks ------------------------------------------------------------------------------------


@KINDS
@UNHURRIED
@given(changes(pages_max=8), st.data())
def test_packed_chunks_give_the_pages_back_and_are_protobuf(kind, changes, data) -> None:
    pfns = np.array(
        sorted(data.draw(st.sets(st.integers(0, 60), min_size=len(changes), max_size=len(changes))))
    )
    older = np.zeros((PAGES, PAGE_BYTES), np.uint8)
    older[pfns] = text_pages(len(pfns)) if data.draw(st.booleans()) else random_pages(len(pfns))
    pages = changed_pages(older[pfns], changes)
    packer = packers(PackingOrder(kind, 64 * PAGE_BYTES), 1, PAGES)[0]
    pfns = pfns.astype(np.uint64)
    packer.pack(1, pfns, older[pfns])
    packing, packed = packer.pack(2, pfns, pages)
    message = message_of(pfns, pages, packing, packed)
    assert (received(message, older) == pages).all()
    protobuf = PageChunk.FromString(message)
    assert protobuf.SerializeToString() == message, "fields in order"
    assert (protobuf.encoding, protobuf.delta, protobuf.decoded_bytes) == (
        packing.encoding,
        packing.delta,
        packing.decoded_bytes,
    )
    head = ChunkHead(ChunkHeader("3f2a", 1, 2, 0), *runs_of(pfns), NONE_U64, NONE_U32, packing, len(packed))
    assert head.size == len(message) - len(packed)


def test_a_delta_against_another_version_is_caught_by_the_page_hash() -> None:
    older = np.zeros((PAGES, PAGE_BYTES), np.uint8)
    older[3] = random_pages(1)[0]
    packer = packers(PackingOrder("none", 64 * PAGE_BYTES), 1, PAGES)[0]
    pfns, newer = np.array([3], np.uint64), changed_pages(older[3:4], [{7}])
    packer.pack(1, pfns, older[3:4])
    message = message_of(pfns, newer, *packer.pack(2, pfns, newer))
    assert len(message) < 200
    received(message, older)
    older[3, 4000] ^= 1
    with pytest.raises(RemoteProtocolError, match="page differs"):
        received(message, older)


def resealed(message, **changes):
    chunk = PageChunk.FromString(message)
    for name, value in changes.items():
        setattr(chunk, name, value)
    header = ChunkHeader(chunk.incarnation, chunk.attempt, chunk.round, chunk.sequence, chunk.stream)
    packing = Packing(chunk.encoding, chunk.delta, chunk.decoded_bytes)
    chunk.chunk_hash = chunk_hash(
        header,
        np.array(chunk.run_first, np.uint64),
        np.array(chunk.run_pages, np.uint32),
        NONE_U64,
        NONE_U32,
        np.frombuffer(chunk.page_hashes, "<u8"),
        packing,
    )
    return chunk.SerializeToString()


def bomb(encoding, size):
    zeros = bytes(size)
    if encoding == ENCODING_LZ4:
        return lz4.block.compress(zeros, store_size=False)
    return zstandard.ZstdCompressor(level=1).compress(zeros)


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_bombs_are_refused_before_they_take_memory(encoding) -> None:
    pages = text_pages(2)
    compressor = Compressor(next(name for name, value in ENCODINGS.items() if value == encoding))
    message = message_of([0, 1], pages, *pack(pages, encoding, compressor, None, NONE_U64))
    assert len(message) < PAGE_BYTES
    received(message)
    for changes in (
        {"data": bomb(encoding, 64 << 20)},
        {"data": bomb(encoding, 64 << 20), "decoded_bytes": 64 << 20},
        {"data": bomb(encoding, 2 * PAGE_BYTES - 8)},
        {"data": b"\xff" * 100},
        {"data": b""},
        {"decoded_bytes": 0},
        {"decoded_bytes": 2 * PAGE_BYTES + 8},
        {"encoding": ENCODING_RAW},
        {"encoding": 7},
        {"delta": b"\0" * 3},
    ):
        broken = resealed(message, **changes)
        tracemalloc.start()
        try:
            with pytest.raises(RemoteProtocolError):
                received(broken)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20, changes
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("name", ["encoding", "delta", "decoded_bytes"])
def test_the_chunk_hash_covers_the_packing(name) -> None:
    message = PageChunk.FromString(message_of([0], text_pages(1), UNPACKED, text_pages(1)))
    setattr(message, name, {"encoding": 1, "delta": b"\1\0\0\0", "decoded_bytes": PAGE_BYTES}[name])
    with pytest.raises(RemoteProtocolError, match="chunk hash"):
        decode_chunk(message.SerializeToString(), pages=PAGES)


@UNHURRIED
@given(st.sampled_from(list(ENCODINGS.values())), st.binary(max_size=200), st.integers(0, 1 << 20))
def test_garbage_does_not_decompress(encoding, garbage, size) -> None:
    try:
        plain = decompress(encoding, memoryview(garbage), size=size)
    except RemoteProtocolError:
        return
    assert plain.nbytes == size


# --- giving up, and remembering -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODINGS)
def test_incompressible_chunks_are_soon_not_tried_any_more_but_looked_at_again(kind, monkeypatch) -> None:
    tried = []
    honest = Compressor._try
    monkeypatch.setattr(
        Compressor, "_try", lambda self, data: tried.append(self._untried == 0) or honest(self, data)
    )
    compressor = Compressor(kind)
    noise = random_pages(16)
    for _ in range(200):
        assert compressor.compress(noise) is None
    assert sum(tried) <= TRIES_MAX + 5, "of 200"
    assert compressor.given_up_chunks == compressor.chunks == 200
    assert compressor.bytes_in == compressor.bytes_out
    packed = [compressor.compress(text_pages(16)) for _ in range(300)]
    assert packed[-1] is not None
    assert packed.count(None) <= 256
    again = [compressor.compress(noise) for _ in range(TRIES_MAX + PAUSE_CHUNKS_MIN)]
    assert set(again) == {None}


def words(count, fill):
    return np.full((count, PAGE_WORDS), fill, np.uint64)


def test_the_cache_is_bounded_and_keeps_what_is_written_again() -> None:
    cache = DeltaCache(no_slots(PAGES), 10 * PAGE_BYTES)
    first = np.arange(100, dtype=np.uint64)
    cache.begin(1)
    cache.keep(first, words(100, 1))
    assert cache.known(first).sum() == 10, "round 1 takes what there is room for"
    again, fresh = np.arange(5, dtype=np.uint64), np.arange(50, 60, dtype=np.uint64)
    cache.begin(2)
    cache.keep(again, words(5, 2))
    cache.keep(fresh, words(10, 3))
    assert cache.known(again).all(), "written again in this round"
    assert cache.known(fresh).sum() == 5
    assert cache.evicted == 5
    assert (cache.versions(again) == 2).all()
    cache.begin(3)
    cache.keep(np.arange(70, 90, dtype=np.uint64), words(20, 4))
    assert cache.known(np.arange(70, 90, dtype=np.uint64)).sum() == 0, "what the last round sent stays"
    cache.begin(4)
    cache.keep(np.arange(70, 90, dtype=np.uint64), words(20, 4))
    assert cache.known(np.arange(70, 90, dtype=np.uint64)).sum() == 10


@UNHURRIED
@given(
    st.lists(
        st.tuples(st.integers(1, 2), st.sets(st.integers(0, 30), max_size=20), st.booleans()), max_size=12
    )
)
def test_the_cache_never_has_another_version_than_was_sent_last(steps) -> None:
    cache, sent, round_index = DeltaCache(no_slots(PAGES), 8 * PAGE_BYTES), {}, 1
    for version, (advance, pages, forgets) in enumerate(steps, start=1):
        round_index += advance - 1
        pfns = np.array(sorted(pages), np.uint64)
        cache.begin(round_index)
        if forgets:
            cache.forget(pfns)
            for pfn in pages:
                sent.pop(pfn, None)
        else:
            cache.keep(pfns, words(len(pfns), version))
            sent |= dict.fromkeys(pages, version)
        everything = np.arange(31, dtype=np.uint64)
        known = everything[cache.known(everything)]
        assert known.size <= 8
        assert {
            int(pfn): int(page[0]) for pfn, page in zip(known, cache.versions(known), strict=True)
        }.items() <= sent.items()


def test_after_a_loss_pages_go_whole() -> None:
    packer = packers(PackingOrder("none", 64 * PAGE_BYTES), 1, PAGES)[0]
    pfns, pages = np.arange(4, dtype=np.uint64), random_pages(4)
    assert packer.pack(1, pfns, pages)[0].delta == b""
    assert packer.pack(2, pfns, pages)[0].delta != b""
    packer.forget(pfns[:2])
    packing, data = packer.pack(2, pfns, pages)
    assert delta.parse(packing.delta, data_pages=4).places.tolist() == [2, 3]
    assert data.nbytes == 2 * PAGE_BYTES


@KINDS
def test_the_report_counts_what_was_packed(kind) -> None:
    order = PackingOrder(kind, 64 * PAGE_BYTES)
    two = packers(order, 2, PAGES)
    pfns, pages = np.arange(4, dtype=np.uint64), text_pages(4)
    for packer in two:
        packer.pack(1, pfns, pages)
        packer.pack(2, pfns[:3], changed_pages(pages[:3], [{1}, {2}, set(range(PAGE_WORDS))]))
        pfns = pfns + 512
    told = report(order, two)
    assert told["delta"]["pages"] == 4
    assert (told["delta"]["cache_hits"], told["delta"]["misses"]) == (6, 0)
    assert 4 * 4000 < told["delta"]["bytes_saved"] < 4 * PAGE_BYTES
    assert told["compression"]["kind"] == kind
    if kind != "none":
        assert told["compression"]["chunks"] == 4
        assert told["compression"]["bytes_out"] < told["compression"]["bytes_in"]
        assert told["compression"]["cpu_seconds_source"] > 0


def test_a_page_that_changed_all_over_goes_whole() -> None:
    packer = Packer("none", DeltaCache(no_slots(PAGES), 64 * PAGE_BYTES))
    pfns, pages = np.arange(2, dtype=np.uint64), random_pages(2)
    packer.pack(1, pfns, pages)
    packing, data = packer.pack(2, pfns, random_pages(2, seed=9))
    assert packing.delta == b""
    assert data.nbytes == 2 * PAGE_BYTES
