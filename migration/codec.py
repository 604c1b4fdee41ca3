"""Page chunks: bytes that are PageChunk messages (migration.proto), made and read without protobuf's copies.

Rule 1: what `encode_chunk` returns is the protobuf message, fields in order and `data` last; `decode_chunk`
        reads whatever protobuf's own parser reads, with the same result, or refuses it.
Rule 2: decode_chunk trusts nothing: every malformed input raises RemoteProtocolError, after work and memory
        bounded by the message's own size and the limits below.
Rule 3: `data` is not copied on the receiving side.
Rule 4: the page hashes cover the pages, the chunk hash covers the page hashes and everything else.

Rule 5: what precedes the pages has a size that is known before they are read, so that a sender reads them into
        their place in the message: a chunk in which no page turns out zero is not copied on that side either.

Measured, in us per chunk of 1 MiB in 1 run (in 256 runs): the head 7 (25), decode 13 (22), page hashes 44 each
side, of which 16 are views of the pages; copying pages to where a head of unknown size ends would be 41.
gRPC takes nothing but `bytes`.
"""

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.pages import PAGE_BYTES, BoolArray, U8Array, U32Array, U64Array
from migration.pb.migration_pb2 import ENCODING_RAW, Encoding, PageChunk

if TYPE_CHECKING:
    from collections.abc import Iterable

Buffer: TypeAlias = bytes | bytearray | memoryview | U8Array

# 4 MiB of data. What a message costs beyond its bytes are the hand-overs between threads, 6 at the sender and 10 at
# the receiver: against messages of 1 MiB the two hosts together take a sixth less CPU (benchmarks/RESULTS.md).
CHUNK_PAGES_MAX = 1024
PACKED_PAGES_MAX = (
    256  # of a chunk that is compressed or has deltas: their cost is the codec's, not the message's
)
ZERO_RUNS_MAX = 4096  # zero records have no data; this many runs are at most 40 KiB of fields
INCARNATION_BYTES_MAX = 64  # a UUID in any spelling
# Everything but `data`. Ours is at most about 50 KiB; protobuf's parser makes eight bytes of one at worst.
SMALL_FIELDS_BYTES_MAX = 96 * 1024
# A field costs about 0.3 us. Room for every list element in a field of its own, which
# protobuf's parsers accept although its writers pack them.
FIELDS_MAX = 16_384
# The three parts of a chunk, and their tags.
MESSAGE_BYTES_MAX = CHUNK_PAGES_MAX * PAGE_BYTES + SMALL_FIELDS_BYTES_MAX + 4096

ZERO_PAGE_HASH = xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES))

# chunk_hash covers: this head, the incarnation, the five lists as little-endian arrays, the delta (rule 4).
HASH_HEAD = struct.Struct("<IIIIQIIIII")
assert HASH_HEAD.size == 44

NO_PFNS: U64Array = np.empty(0, np.uint64)
NO_COUNTS: U32Array = np.empty(0, np.uint32)

WIRE_VARINT, WIRE_FIXED64, WIRE_BYTES, WIRE_FIXED32 = 0, 1, 2, 5
SMALL_FIELDS = frozenset(PageChunk.DESCRIPTOR.fields_by_number) - {PageChunk.DATA_FIELD_NUMBER}
HASHES_TAG = PageChunk.PAGE_HASHES_FIELD_NUMBER << 3 | WIRE_BYTES
CHUNK_HASH_TAG = PageChunk.CHUNK_HASH_FIELD_NUMBER << 3 | WIRE_FIXED64
CHUNK_HASH_FIELD = struct.Struct("<BQ")
DATA_TAG = PageChunk.DATA_FIELD_NUMBER << 3 | WIRE_BYTES
assert DATA_TAG < 0x80, "these tags are one byte each"


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Which chunk this is; attempts and rounds count from 1, streams from 0, and so each stream's sequence."""

    incarnation: str
    attempt: int
    round_index: int
    sequence: int
    stream: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """What `data` is, when it is not just the pages: see migration/packing.py."""

    encoding: int = ENCODING_RAW
    delta: bytes = b""
    decoded_bytes: int = 0  # 0 when the encoding is RAW


UNPACKED = Packing()


@dataclass(frozen=True, slots=True, eq=False)
class DecodedChunk:
    """A received chunk whose fields are consistent: runs are ascending, and no page is in two of them.

    A chunk without pages is legal: it asks for an acknowledgement.
    `data` is a view of the message: (data_pages * PAGE_BYTES,), unless it is packed. `page_hashes` has one u64 per
    data page. Whether the data has these hashes is not known before `verify`.
    """

    header: ChunkHeader
    run_first: U64Array
    run_pages: U32Array
    zero_first: U64Array
    zero_pages: U32Array
    page_hashes: U64Array
    data: memoryview
    data_page_count: int
    zero_page_count: int
    packing: Packing = UNPACKED


def page_hashes(data: Buffer) -> U64Array:
    """xxh3_64 of every page of `data`, whose size is a multiple of PAGE_BYTES.

    The one loop over pages of the project: a call per page is faster than any way around it (0.16 us a page).
    """
    rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_BYTES)
    return np.fromiter(
        map(xxhash.xxh3_64_intdigest, cast("Iterable[memoryview]", rows)), np.uint64, len(rows)
    )


def zero_pages_mask(data: Buffer) -> BoolArray:
    """Which pages of `data`, whose size is a multiple of PAGE_BYTES, are all zero: bools, one a page.

    Only pages whose middle word is zero are looked at as a whole; random data costs one word a page.
    """
    words = np.frombuffer(data, np.uint64).reshape(-1, PAGE_BYTES // 8)
    suspects = np.flatnonzero(words[:, words.shape[1] // 2] == 0)
    mask = np.zeros(len(words), np.bool_)
    if suspects.size == len(words):
        np.equal(np.bitwise_or.reduce(words, axis=1), 0, out=mask)
    elif suspects.size:
        mask[suspects] = np.bitwise_or.reduce(words[suspects], axis=1) == 0
    return mask


def chunk_hash(  # noqa: PLR0917 - the message's fields, in its order
    header: ChunkHeader,
    run_first: U64Array,
    run_pages: U32Array,
    zero_first: U64Array,
    zero_pages: U32Array,
    hashes: U64Array,
    packing: Packing = UNPACKED,
) -> int:
    """xxh3_64 over the header fields, the runs and the page hashes, and so by way of these over the data."""
    incarnation = header.incarnation.encode()
    head = HASH_HEAD.pack(
        len(incarnation),
        header.attempt,
        header.round_index,
        header.stream,
        header.sequence,
        run_first.size,
        zero_first.size,
        hashes.size,
        packing.encoding,
        packing.decoded_bytes,
    )
    lists = (
        run_first.astype("<u8", copy=False),
        run_pages.astype("<u4", copy=False),
        zero_first.astype("<u8", copy=False),
        zero_pages.astype("<u4", copy=False),
        hashes.astype("<u8", copy=False),
    )
    return xxhash.xxh3_64_intdigest(
        b"".join((head, incarnation, *(part.tobytes() for part in lists), packing.delta))
    )


def image_digest(sent_hashes: U64Array, vcpu_state: bytes, device_state: bytes) -> int:
    """xxh3_64 that names the whole image: the last-sent hash of every page (pages,) and the two states."""
    digest = xxhash.xxh3_64(struct.pack("<QQQ", sent_hashes.size, len(vcpu_state), len(device_state)))
    digest.update(np.ascontiguousarray(sent_hashes, "<u8").data)
    digest.update(vcpu_state)
    digest.update(device_state)
    return digest.intdigest()


class ChunkHead:
    """Everything of a message that precedes its pages. Only the hashes, which have a fixed size, come later.

    Attributes:
        size: bytes that the head will have.
        data_pages: pages of the data runs.
        data_bytes: of the data: their pages, unless they are packed.

    Raises:
        LocalProtocolError: the lists do not fit each other, or exceed a limit.
    """

    def __init__(  # noqa: PLR0917 - the message's fields, in its order
        self,
        header: ChunkHeader,
        run_first: U64Array,
        run_pages: U32Array,
        zero_first: U64Array,
        zero_pages: U32Array,
        packing: Packing = UNPACKED,
        data_bytes: int | None = None,
    ) -> None:
        if run_first.size != run_pages.size or zero_first.size != zero_pages.size:
            raise LocalProtocolError("runs of unequal lists")
        data_pages = sum(run_pages.tolist())
        if data_pages > CHUNK_PAGES_MAX or zero_first.size > ZERO_RUNS_MAX:
            raise LocalProtocolError("chunk too large", data_pages=data_pages, zero_runs=zero_first.size)
        self._parts = header, run_first, run_pages, zero_first, zero_pages
        self._packing = packing
        self._fields = PageChunk(
            incarnation=header.incarnation,
            attempt=header.attempt,
            round=header.round_index,
            sequence=header.sequence,
            run_first=run_first.tolist(),
            run_pages=run_pages.tolist(),
            zero_first=zero_first.tolist(),
            zero_pages=zero_pages.tolist(),
        ).SerializeToString()
        self._hashes_prefix = _prefix(HASHES_TAG, data_pages * 8)
        rest = b""  # the fields numbered after the chunk's hash; nearly always there are none
        if header.stream or packing is not UNPACKED:
            rest = PageChunk(
                stream=header.stream,
                encoding=cast("Any", packing.encoding),
                delta=packing.delta,
                decoded_bytes=packing.decoded_bytes,
            ).SerializeToString()
        self.data_bytes = data_pages * PAGE_BYTES if data_bytes is None else data_bytes
        self._data_prefix = rest + _prefix(DATA_TAG, self.data_bytes)
        self.data_pages = data_pages
        self.size = (
            len(self._fields)
            + len(self._hashes_prefix)
            + data_pages * 8
            + CHUNK_HASH_FIELD.size
            + len(self._data_prefix)
        )

    def to_bytes(self, hashes: U64Array) -> bytes:
        """The head of the message whose pages have these hashes.

        Raises:
            LocalProtocolError: not one hash a page.
        """
        if hashes.size != self.data_pages:
            raise LocalProtocolError("not one hash a page", pages=self.data_pages, hashes=hashes.size)
        return b"".join(
            (
                self._fields,
                self._hashes_prefix,
                hashes.astype("<u8", copy=False).tobytes(),
                CHUNK_HASH_FIELD.pack(CHUNK_HASH_TAG, chunk_hash(*self._parts, hashes, self._packing)),
                self._data_prefix,
            )
        )


def encode_chunk(  # noqa: PLR0917 - the message's fields, in its order
    header: ChunkHeader,
    run_first: U64Array,
    run_pages: U32Array,
    zero_first: U64Array,
    zero_pages: U32Array,
    hashes: U64Array,
    data: Buffer,
    packing: Packing = UNPACKED,
) -> bytes:
    """The message. `data` is the pages of the runs, one after the other, or packed; `hashes` are the pages'.

    Raises:
        LocalProtocolError: lists, hashes and data do not fit each other, or exceed a limit.
    """
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    packed_bytes = None if packing is UNPACKED else view.nbytes
    head = ChunkHead(header, run_first, run_pages, zero_first, zero_pages, packing, packed_bytes)
    if view.nbytes != head.data_bytes:
        raise LocalProtocolError("data does not fit the runs", pages=head.data_pages, data=view.nbytes)
    return b"".join((head.to_bytes(hashes), view))


def decode_chunk(message: bytes, *, pages: int) -> DecodedChunk:
    """Reads and checks one chunk for a guest of `pages` pages; `data` stays in `message`.

    Raises:
        RemoteProtocolError: anything at all is wrong with it.
    """
    chunk, data = _parse(message)
    header = ChunkHeader(chunk.incarnation, chunk.attempt, chunk.round, chunk.sequence, chunk.stream)
    if (
        len(header.incarnation.encode()) > INCARNATION_BYTES_MAX
        or not header.attempt
        or not header.round_index
    ):
        raise RemoteProtocolError(
            "chunk header out of range", attempt=header.attempt, round_index=header.round_index
        )
    run_first, run_pages = np.array(chunk.run_first, np.uint64), np.array(chunk.run_pages, np.uint32)
    zero_first, zero_pages = NO_PFNS, NO_COUNTS
    if chunk.zero_first or chunk.zero_pages:
        zero_first, zero_pages = np.array(chunk.zero_first, np.uint64), np.array(chunk.zero_pages, np.uint32)
    data_page_count = _check_runs("data", run_first, run_pages, pages=pages, runs_max=CHUNK_PAGES_MAX)
    zero_page_count = _check_runs("zero", zero_first, zero_pages, pages=pages, runs_max=ZERO_RUNS_MAX)
    if data_page_count and zero_page_count:
        _check_apart(run_first, run_pages, zero_first, zero_pages)
    if data_page_count > (CHUNK_PAGES_MAX if _packing_of(chunk) is UNPACKED else PACKED_PAGES_MAX):
        raise RemoteProtocolError("chunk too large", data_pages=data_page_count)
    packing = _packing_of(chunk)
    fits = data.nbytes == data_page_count * PAGE_BYTES if packing is UNPACKED else data_page_count > 0
    if len(chunk.page_hashes) != data_page_count * 8 or not fits:
        raise RemoteProtocolError(
            "chunk's lengths disagree",
            data_pages=data_page_count,
            hashes=len(chunk.page_hashes),
            data=data.nbytes,
        )
    hashes = np.frombuffer(chunk.page_hashes, "<u8").astype(np.uint64, copy=False)
    if chunk.chunk_hash != chunk_hash(header, run_first, run_pages, zero_first, zero_pages, hashes, packing):
        raise RemoteProtocolError("chunk hash differs", sequence=header.sequence)
    return DecodedChunk(
        header=header,
        run_first=run_first,
        run_pages=run_pages,
        zero_first=zero_first,
        zero_pages=zero_pages,
        page_hashes=hashes,
        data=data,
        data_page_count=data_page_count,
        zero_page_count=zero_page_count,
        packing=packing,
    )


def _packing_of(chunk: PageChunk) -> Packing:
    if not (chunk.encoding or chunk.delta or chunk.decoded_bytes):
        return UNPACKED
    if chunk.encoding not in Encoding.values():
        raise RemoteProtocolError("unknown encoding", encoding=chunk.encoding)
    return Packing(chunk.encoding, chunk.delta, chunk.decoded_bytes)


def verify(chunk: DecodedChunk) -> None:
    """Hashes the received pages.

    Raises:
        RemoteProtocolError: a page differs from its hash; the first such page is named.
    """
    wrong = np.flatnonzero(page_hashes(chunk.data) != chunk.page_hashes)
    if wrong.size:
        ends = np.cumsum(chunk.run_pages, dtype=np.int64)
        run = int(np.searchsorted(ends, wrong[0], side="right"))
        pfn = int(chunk.run_first[run]) + int(wrong[0]) - int(ends[run] - chunk.run_pages[run])
        raise RemoteProtocolError(
            "page differs from its hash", pfn=pfn, pages=int(wrong.size), sequence=chunk.header.sequence
        )


def _check_runs(name: str, first: U64Array, count: U32Array, *, pages: int, runs_max: int) -> int:
    """The number of pages of runs that must be ascending, disjoint, not empty and within the guest."""
    if first.size != count.size or first.size > runs_max:
        raise RemoteProtocolError(f"{name} runs: bad number", first=first.size, count=count.size)
    if not first.size:
        return 0
    if first.size == 1:  # nearly every chunk of a first round
        only, length = int(first[0]), int(count[0])
        if not 0 < length <= pages - only:
            raise RemoteProtocolError(f"{name} runs: out of range", pages=pages, first=only)
        return length
    # Bounding `first` before adding keeps the sum from wrapping; a count has 32 bits.
    if int(first.max()) >= pages or not count.all():
        raise RemoteProtocolError(f"{name} runs: out of range", pages=pages, first=int(first.max()))
    end = first + count
    if int(end[-1]) > pages or (first[1:] < end[:-1]).any():
        raise RemoteProtocolError(f"{name} runs: out of range, out of order or overlapping", pages=pages)
    return int(count.sum(dtype=np.uint64))


def _check_apart(
    run_first: U64Array, run_pages: U32Array, zero_first: U64Array, zero_pages: U32Array
) -> None:
    """Data and zero runs, each ascending and disjoint, must not share a page."""
    following = np.searchsorted(zero_first, run_first)
    overlaps_next = np.append(zero_first, np.uint64(2**63))[following] < run_first + run_pages
    zero_ends = np.append(np.uint64(0), zero_first + zero_pages)
    if overlaps_next.any() or (zero_ends[following] > run_first).any():
        raise RemoteProtocolError("a page is both data and zero")


def _prefix(tag: int, size: int) -> bytes:
    """Tag and length of a field of bytes; nothing for an empty one, which protobuf leaves out."""
    if not size:
        return b""
    prefix = bytearray((tag,))
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix)


def _varint(message: bytes, position: int, *, bytes_max: int) -> tuple[int, int]:
    """A protobuf varint of at most `bytes_max` bytes, and the position behind it."""
    if position < len(message) and message[position] < 0x80:
        return message[position], position + 1  # nearly all of them
    value = 0
    for shift, byte in enumerate(message[position : position + bytes_max]):
        value |= (byte & 0x7F) << (7 * shift)
        if byte < 0x80:
            return value, position + shift + 1
    raise RemoteProtocolError("chunk: broken varint", position=position)


def _parse(message: bytes) -> tuple[PageChunk, memoryview]:
    """The message's small fields, and a view of `data`, which protobuf never sees."""
    chunk = PageChunk()
    # Ours end with `data`, before which every page has its hash. If protobuf takes everything before it as whole
    # fields, then it would also see this field there; if not, the message is of another shape, and is walked
    # field by field. So are messages that may have no data, or are packed.
    pages = len(message) // (PAGE_BYTES + 8)
    for guess in range(pages, max(pages - 2, 0), -1):  # one too many where the lists of runs are long
        prefix = _prefix(DATA_TAG, guess * PAGE_BYTES)
        small_bytes = len(message) - guess * PAGE_BYTES - len(prefix)
        if small_bytes >= 0 and message.startswith(prefix, small_bytes):
            try:
                chunk.ParseFromString(message[:small_bytes])
            except DecodeError:
                chunk.Clear()
                break
            return chunk, memoryview(message)[small_bytes + len(prefix) :]
    small, data = _split(message)
    try:
        chunk.ParseFromString(small)
    except DecodeError as error:
        raise RemoteProtocolError("chunk is no protobuf message", size=len(message)) from error
    return chunk, data


def _split(message: bytes) -> tuple[bytes, memoryview]:
    """Takes the message apart into everything but `data`, for protobuf to parse, and a view of `data`.

    As in protobuf the last of several `data` fields counts, and fields that nobody knows are passed over.
    """
    view = memoryview(message)
    data = view[:0]
    kept: list[memoryview] = []
    kept_bytes = position = value = fields = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position, bytes_max=5)
        number, wire = tag >> 3, tag & 7
        if wire == WIRE_BYTES:
            size, value = _varint(message, position, bytes_max=5)
            position = value + size
        elif wire == WIRE_VARINT:
            _, position = _varint(message, position, bytes_max=10)
        elif wire in {WIRE_FIXED64, WIRE_FIXED32}:
            position += 8 if wire == WIRE_FIXED64 else 4
        else:
            raise RemoteProtocolError("chunk: unknown wire type", wire=wire, position=start)
        fields += 1
        if position > len(message) or not 0 < number < 1 << 29 or fields > FIELDS_MAX:
            raise RemoteProtocolError("chunk: truncated, or a field too many", position=start, fields=fields)
        if tag == DATA_TAG:
            data = view[value:position]
        elif number in SMALL_FIELDS:
            kept.append(view[start:position])
            kept_bytes += position - start
    if kept_bytes > SMALL_FIELDS_BYTES_MAX:
        raise RemoteProtocolError("chunk: lists too long", size=kept_bytes)
    return b"".join(kept), data
