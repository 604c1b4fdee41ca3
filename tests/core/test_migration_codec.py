"""Chunks are protobuf messages in both directions, and nothing that arrives can do more than be refused."""

import tracemalloc

import numpy as np
import pytest
import xxhash
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from migration import codec
from migration.codec import (
    CHUNK_PAGES_MAX,
    MESSAGE_BYTES_MAX,
    ZERO_PAGE_HASH,
    ZERO_RUNS_MAX,
    ChunkHead,
    ChunkHeader,
    chunk_hash,
    decode_chunk,
    encode_chunk,
    image_digest,
    page_hashes,
    verify,
    zero_pages_mask,
)
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.pages import PAGE_BYTES
from migration.pb.migration_pb2 import PageChunk

PAGES = 1 << 16
HEADER = ChunkHeader(incarnation="3f2a", attempt=2, round_index=7, sequence=1234567890123)


def u64(values):
    return np.array(values, np.uint64)


def u32(values):
    return np.array(values, np.uint32)


def page_data(count, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE_BYTES), np.uint8)


@st.composite
def chunk_parts(draw):
    """What a sender may say: ascending runs, some data, some zero, and a header."""
    gaps_and_lengths = draw(
        st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 6), st.booleans()), max_size=12)
    )
    runs = {True: ([], []), False: ([], [])}
    position = 0
    for gap, length, is_data in gaps_and_lengths:
        runs[is_data][0].append(position + gap)
        runs[is_data][1].append(length)
        position += gap + length
    header = ChunkHeader(
        incarnation=draw(st.text(max_size=16)),
        attempt=draw(st.integers(1, 2**32 - 1)),
        round_index=draw(st.integers(1, 2**32 - 1)),
        sequence=draw(st.integers(0, 2**64 - 1)),
    )
    data = page_data(sum(runs[True][1]), seed=draw(st.integers(0, 99)))
    return (
        header,
        u64(runs[True][0]),
        u32(runs[True][1]),
        u64(runs[False][0]),
        u32(runs[False][1]),
        page_hashes(data),
        data,
    )


def as_protobuf(parts):
    header, run_first, run_pages, zero_first, zero_pages, hashes, data = parts
    return PageChunk(
        incarnation=header.incarnation,
        attempt=header.attempt,
        round=header.round_index,
        sequence=header.sequence,
        run_first=run_first.tolist(),
        run_pages=run_pages.tolist(),
        zero_first=zero_first.tolist(),
        zero_pages=zero_pages.tolist(),
        page_hashes=hashes.tobytes(),
        chunk_hash=chunk_hash(*parts[:6]),
        data=data.tobytes(),
    )


def resealed(message):
    """Gives a wrong message a right chunk hash, so that only its wrongness is left to be found."""
    header = ChunkHeader(message.incarnation, message.attempt, message.round, message.sequence)
    message.chunk_hash = chunk_hash(
        header,
        u64(message.run_first),
        u32(message.run_pages),
        u64(message.zero_first),
        u32(message.zero_pages),
        np.frombuffer(message.page_hashes[: len(message.page_hashes) // 8 * 8], "<u8"),
    )
    return message.SerializeToString()


def assert_says_the_same(chunk, message) -> None:
    assert chunk.header == ChunkHeader(message.incarnation, message.attempt, message.round, message.sequence)
    assert chunk.run_first.tolist() == list(message.run_first)
    assert chunk.run_pages.tolist() == list(message.run_pages)
    assert chunk.zero_first.tolist() == list(message.zero_first)
    assert chunk.zero_pages.tolist() == list(message.zero_pages)
    assert chunk.page_hashes.tobytes() == message.page_hashes
    assert bytes(chunk.data) == message.data
    assert chunk.data_page_count == sum(message.run_pages)
    assert chunk.zero_page_count == sum(message.zero_pages)


def fields_of(encoded):
    """The fields of a serialised message, each with its tag, by a walk of our own making."""
    fields, position = [], 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = encoded[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(encoded):
        start = position
        wire = varint() & 7
        if wire == 2:
            size = varint()
            position += size
        elif wire == 0:
            varint()
        else:
            position += 8 if wire == 1 else 4
        fields.append(encoded[start:position])
    return fields


# --- both ways against protobuf's own parser ---------------------------------------------------------


@given(chunk_parts())
def test_our_bytes_are_protobufs_bytes(parts) -> None:
    encoded = encode_chunk(*parts)
    assert ChunkHead(*parts[:5]).size == len(encoded) - parts[6].nbytes, "known before the pages are"
    assert type(encoded) is bytes, "gRPC takes nothing else"
    assert encoded == as_protobuf(parts).SerializeToString()
    assert_says_the_same(decode_chunk(encoded, pages=PAGES), PageChunk.FromString(encoded))


@given(chunk_parts(), st.randoms(use_true_random=False))
def test_fields_in_any_order_with_unknown_ones_between(parts, random) -> None:
    message = as_protobuf(parts)
    unknown = [
        b"\xa0\x06\x01",
        b"\xa2\x06\x03abc",
        b"\xa1\x06" + bytes(8),
        b"\xa5\x06" + bytes(4),
    ]  # field 100
    # Field 15 with another wire type than `data` has is an unknown field too.
    unknown.append(b"\x78\x05")
    fields = fields_of(message.SerializeToString()) + unknown
    random.shuffle(fields)
    chunk = decode_chunk(b"".join(fields), pages=PAGES)
    assert_says_the_same(chunk, message)
    verify(chunk)


def test_lists_that_are_not_packed_are_read_too() -> None:
    """A protobuf parser must accept both forms of a repeated scalar field."""
    message = PageChunk(incarnation="x", attempt=1, round=1, zero_first=[3, 300], zero_pages=[1, 2])
    encoded = resealed(message)
    unpacked = b"".join(field for field in fields_of(encoded) if field[0] >> 3 not in {7, 8})
    unpacked += b"\x38\x03\x38\xac\x02\x40\x01\x40\x02"
    assert_says_the_same(decode_chunk(unpacked, pages=PAGES), message)


def test_of_two_data_fields_the_last_counts_as_in_protobuf() -> None:
    data = page_data(1)
    encoded = encode_chunk(HEADER, u64([5]), u32([1]), u64([]), u32([]), page_hashes(data), data)
    doubled = codec._prefix(codec.DATA_TAG, 3) + b"abc" + encoded
    assert_says_the_same(decode_chunk(doubled, pages=PAGES), PageChunk.FromString(doubled))
    with pytest.raises(RemoteProtocolError, match="disagree"):
        decode_chunk(encoded + codec._prefix(codec.DATA_TAG, 3) + b"abc", pages=PAGES)


def test_the_largest_chunk_passes_and_its_data_is_not_copied() -> None:
    data = page_data(CHUNK_PAGES_MAX)
    first = u64(range(0, 3 * CHUNK_PAGES_MAX, 3))
    zeros = u64(range(2**40 + 1, 2**40 + 1 + 2 * ZERO_RUNS_MAX, 2))
    ones = np.ones(ZERO_RUNS_MAX, np.uint32)
    parts = (HEADER, first, ones[:CHUNK_PAGES_MAX], zeros, ones, page_hashes(data), data)
    encoded = encode_chunk(*parts)
    assert len(encoded) <= MESSAGE_BYTES_MAX
    chunk = decode_chunk(encoded, pages=2**41)
    verify(chunk)
    assert chunk.data.obj is encoded
    assert_says_the_same(chunk, PageChunk.FromString(encoded))


def test_a_chunk_without_pages_is_legal() -> None:
    encoded = encode_chunk(HEADER, u64([]), u32([]), u64([]), u32([]), u64([]), b"")
    chunk = decode_chunk(encoded, pages=PAGES)
    verify(chunk)
    assert (chunk.data_page_count, chunk.zero_page_count, chunk.data.nbytes) == (0, 0, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_any_buffer_may_hold_the_data(kind) -> None:
    data = page_data(2)
    hashes = page_hashes(kind(data.tobytes()))
    assert hashes.tolist() == page_hashes(data).tolist()
    encoded = encode_chunk(HEADER, u64([5]), u32([2]), u64([]), u32([]), hashes, kind(data.tobytes()))
    chunk = decode_chunk(encoded, pages=PAGES)
    verify(chunk)
    assert bytes(chunk.data) == data.tobytes()


# --- what must be refused ----------------------------------------------------------------------------


@given(st.binary(max_size=400))
@example(b"\x0b")  # start of a group
@example(b"\x7a\xff\xff\xff\xff\x0f")  # data of 4 GiB in six bytes
@example(b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")  # a tag that does not end
def test_garbage_is_refused_and_nothing_else(garbage) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_chunk(garbage, pages=PAGES)


@given(chunk_parts(), st.data())
def test_every_truncation_is_refused(parts, data) -> None:
    encoded = encode_chunk(*parts)
    with pytest.raises(RemoteProtocolError):
        decode_chunk(encoded[: data.draw(st.integers(0, len(encoded) - 1))], pages=PAGES)


@given(chunk_parts(), st.data())
def test_a_changed_byte_is_refused_or_changes_nothing(parts, data) -> None:
    """Whatever is accepted and verified says what was sent, and protobuf agrees about it."""
    encoded = bytearray(encode_chunk(*parts))
    # Most bytes are page data; aim at the small fields as often as at these.
    small = len(encoded) - parts[6].nbytes
    position = data.draw(st.one_of(st.integers(0, small - 1), st.integers(0, len(encoded) - 1)))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        chunk = decode_chunk(bytes(encoded), pages=PAGES)
        verify(chunk)
    except RemoteProtocolError:
        return
    assert_says_the_same(chunk, PageChunk.FromString(bytes(encoded)))
    assert_says_the_same(chunk, as_protobuf(parts))


@given(chunk_parts(), st.data())
def test_inserted_bytes_never_make_us_differ_from_protobuf(parts, data) -> None:
    encoded = encode_chunk(*parts)
    position = data.draw(st.integers(0, len(encoded) - parts[6].nbytes))
    mutated = encoded[:position] + data.draw(st.binary(min_size=1, max_size=8)) + encoded[position:]
    try:
        chunk = decode_chunk(mutated, pages=PAGES)
    except RemoteProtocolError:
        return
    try:
        message = PageChunk.FromString(mutated)
    except DecodeError:
        pytest.fail("accepted what protobuf refuses")
    assert_says_the_same(chunk, message)


def chunk_of(**changes):
    """Two data pages 10, 11 and zero pages 20..22, with some fields replaced."""
    data = page_data(2)
    message = as_protobuf((HEADER, u64([10]), u32([2]), u64([20]), u32([3]), page_hashes(data), data))
    for name, value in changes.items():
        if isinstance(value, list):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attempt": 0}, "header"),
        ({"round": 0}, "header"),
        ({"incarnation": "x" * 65}, "header"),
        ({"run_first": [10, 12]}, "number"),
        ({"run_pages": [1, 1]}, "number"),
        ({"zero_first": []}, "number"),
        ({"run_pages": [0]}, "out of range"),
        ({"zero_pages": [0]}, "out of range"),
        ({"run_first": [PAGES]}, "out of range"),
        ({"run_first": [PAGES - 1]}, "out of range"),
        ({"run_first": [2**64 - 1]}, "out of range"),
        ({"zero_first": [2**64 - 1]}, "out of range"),
        ({"zero_first": [PAGES - 2]}, "out of range"),
        ({"zero_pages": [2**32 - 1]}, "out of range"),
        ({"run_first": [10, 9], "run_pages": [1, 1]}, "out of order"),
        ({"run_first": [10, 10], "run_pages": [1, 1]}, "out of order"),
        ({"zero_first": [20, 22], "zero_pages": [3, 1]}, "out of order"),
        ({"zero_first": [11]}, "both data and zero"),
        ({"zero_first": [9], "zero_pages": [2]}, "both data and zero"),
        ({"zero_first": [0], "zero_pages": [100]}, "both data and zero"),
        ({"run_pages": [3]}, "disagree"),
        ({"page_hashes": bytes(15)}, "disagree"),
        ({"page_hashes": b""}, "disagree"),
        ({"data": bytes(2 * PAGE_BYTES - 1)}, "disagree"),
        ({"data": b""}, "disagree"),
        ({"run_pages": [CHUNK_PAGES_MAX + 1], "zero_first": [5000]}, "too large"),
        ({"run_pages": [40_000], "zero_first": [50_000]}, "too large"),
    ],
)
def test_inconsistent_chunks_are_refused_although_their_hash_is_right(changes, reason) -> None:
    encoded = resealed(chunk_of(**changes))
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_chunk(encoded, pages=PAGES)


def test_text_that_is_no_text_is_refused() -> None:
    encoded = encode_chunk(HEADER, u64([]), u32([]), u64([1]), u32([1]), u64([]), b"")
    with pytest.raises(RemoteProtocolError, match="no protobuf"):
        decode_chunk(encoded.replace(b"3f2a", b"\xff\xfe\xfd\xfc"), pages=PAGES)


@pytest.mark.parametrize("name", ["attempt", "round", "sequence"])
def test_the_chunk_hash_covers_the_header(name) -> None:
    message = chunk_of()
    setattr(message, name, getattr(message, name) + 1)
    with pytest.raises(RemoteProtocolError, match="chunk hash"):
        decode_chunk(message.SerializeToString(), pages=PAGES)


def test_a_page_that_differs_from_its_hash_is_named() -> None:
    data = page_data(5)
    hashes = page_hashes(data)
    data[3, 4095] ^= 1
    encoded = encode_chunk(HEADER, u64([10, 100]), u32([2, 3]), u64([]), u32([]), hashes, data)
    chunk = decode_chunk(encoded, pages=PAGES)
    with pytest.raises(RemoteProtocolError, match="page differs") as caught:
        verify(chunk)
    assert caught.value.facts["pfn"] == 101


def test_floods_of_list_entries_and_of_fields_are_refused_before_they_are_parsed() -> None:
    flood = bytes(1 << 20)
    # run_first with a million entries
    packed = b"\x2a" + codec._prefix(codec.DATA_TAG, len(flood))[1:] + flood
    with pytest.raises(RemoteProtocolError, match="too long"):
        decode_chunk(packed, pages=PAGES)
    with pytest.raises(RemoteProtocolError, match="too many"):
        decode_chunk(b"\x28\x01" * (1 << 19), pages=PAGES)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_chunk(packed, pages=PAGES)
        assert tracemalloc.get_traced_memory()[1] < len(packed)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"run_pages": u32([3])},
        {"run_pages": u32([1, 1])},
        {"zero_first": u64([1])},
        {"hashes": u64([1])},
        {"data": page_data(3)},
    ],
)
def test_what_does_not_fit_is_not_encoded(wrong) -> None:
    parts = {
        "run_first": u64([10]),
        "run_pages": u32([2]),
        "zero_first": u64([]),
        "zero_pages": u32([]),
        "hashes": u64([1, 2]),
        "data": page_data(2),
    }
    with pytest.raises(LocalProtocolError):
        encode_chunk(HEADER, **parts | wrong)


def test_chunks_beyond_the_limits_are_not_encoded() -> None:
    data = np.zeros((CHUNK_PAGES_MAX + 1, PAGE_BYTES), np.uint8)
    with pytest.raises(LocalProtocolError, match="too large"):
        encode_chunk(HEADER, u64([0]), u32([len(data)]), u64([]), u32([]), page_hashes(data), data)
    many = u64(range(0, 2 * ZERO_RUNS_MAX + 2, 2))
    with pytest.raises(LocalProtocolError, match="too large"):
        encode_chunk(HEADER, u64([]), u32([]), many, np.ones(many.size, np.uint32), u64([]), b"")


# --- hashes and zeros --------------------------------------------------------------------------------


def test_page_hashes_are_xxh3_64_of_each_page() -> None:
    data = page_data(3)
    data[1] = 0
    assert page_hashes(data).tolist() == [xxhash.xxh3_64_intdigest(page.tobytes()) for page in data]
    assert int(page_hashes(data)[1]) == ZERO_PAGE_HASH


@given(
    st.lists(
        st.one_of(st.none(), st.tuples(st.integers(0, PAGE_BYTES - 1), st.integers(1, 255))), max_size=20
    )
)
def test_zero_pages_are_found_wherever_their_neighbours_only_byte_lies(bytes_set) -> None:
    buffer = np.zeros((len(bytes_set), PAGE_BYTES), np.uint8)
    for page, byte in enumerate(bytes_set):
        if byte is not None:
            buffer[page, byte[0]] = byte[1]
    assert zero_pages_mask(buffer).tolist() == [byte is None for byte in bytes_set]


def test_full_pages_with_a_zero_word_in_the_middle_are_not_zero() -> None:
    buffer = page_data(4)
    buffer[:3, PAGE_BYTES // 2 : PAGE_BYTES // 2 + 8] = 0
    buffer[2] = 0
    assert zero_pages_mask(buffer).tolist() == [False, False, True, False]


def test_the_image_digest_tells_every_part_and_every_border_between_parts() -> None:
    digests = {
        image_digest(u64([1, 2]), b"ab", b"c"),
        image_digest(u64([2, 1]), b"ab", b"c"),
        image_digest(u64([1, 2]), b"a", b"bc"),
        image_digest(u64([1, 2]), b"abc", b""),
        image_digest(u64([1]), (2).to_bytes(8, "little") + b"ab", b"c"),
        image_digest(u64([]), b"", b""),
    }
    assert len(digests) == 6
    assert all(0 <= digest < 2**64 for digest in digests)
    assert image_digest(u64([1, 9, 2])[::2], b"ab", b"c") == image_digest(u64([1, 2]), b"ab", b"c")
