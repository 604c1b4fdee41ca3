"""What the fuzzer runs: one function per parser that reads what a peer or a guest wrote.

Rule 1: a target returns, or raises what only a bug of ours raises. Typed errors that blame the other side are
        what these parsers are for, and end an input.
Rule 2: what an input means is decided by its bytes alone, so that a file of the corpus says the same for ever.
Rule 3: checksums are set right where they would stop everything: nobody guesses an xxh3.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from migration.codec import UNPACKED, ChunkHeader, Packing, chunk_hash, decode_chunk, page_hashes, verify
from migration.errors import RemoteProtocolError
from migration.packing import unpack
from migration.pages import PAGE_BYTES, pfns_of
from migration.pb.migration_pb2 import PageChunk
from virtio.balloon_device import BalloonDevice, reader
from virtio.errors import GuestProtocolError, VhostUserError
from virtio.ring_layout import avail_bytes, layout_at, used_bytes
from virtio.split_ring import DeviceRing
from virtio.testing_vhost_user import MockBackend
from virtio.vhost_user import Message, Request, decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.codec import DecodedChunk
    from migration.pages import U64Array

GUEST_PAGES = 1024
CHAIN_ERRORS = {
    "address_range", "chain_bytes", "chain_length", "chain_loop", "direction", "indirect_next",
    "indirect_nested", "indirect_not_negotiated", "indirect_size", "length_zero", "next_range",
    "avail_index", "head_range", "head_in_flight",
}  # fmt: skip


# -- the chunk codec, with compression and deltas --------------------------------------------------


def chunk(data: bytes) -> None:
    """First byte: 0 the message as it is, 1 with its chunk hash set right, 2 with its page hashes as well."""
    if not data:
        return
    message = data[1:]
    if data[0] % 3:
        signed = _signed(message, with_pages=data[0] % 3 == 2)
        if signed is None:
            return
        message = signed
    try:
        decoded = decode_chunk(message, pages=GUEST_PAGES)
    except RemoteProtocolError:
        return
    _check_as_protobuf_reads_it(message, decoded)
    try:
        unpacked = decoded if decoded.packing is UNPACKED else unpack(decoded, _older)
        assert unpacked.data.nbytes == decoded.data_page_count * PAGE_BYTES
        verify(unpacked)
    except RemoteProtocolError:
        return
    pfns = pfns_of(unpacked.run_first, unpacked.run_pages)
    zero = pfns_of(unpacked.zero_first, unpacked.zero_pages)
    assert len(np.union1d(pfns, zero)) == len(pfns) + len(zero), "a page twice"
    assert all(int(some.max(initial=0)) < GUEST_PAGES for some in (pfns, zero)), "a page outside"
    assert (page_hashes(unpacked.data) == unpacked.page_hashes).all()


def _older(pfns: U64Array, into: memoryview) -> None:
    """Pages as a destination that stored nothing yet has them."""
    into[:] = bytes(len(pfns) * PAGE_BYTES)


def _signed(message: bytes, *, with_pages: bool) -> bytes | None:
    fields = PageChunk()
    try:
        fields.ParseFromString(message)
    except DecodeError:
        return None
    if with_pages:
        fields.page_hashes = _hashes_of(fields)
    packing = Packing(fields.encoding, fields.delta, fields.decoded_bytes)
    raw = not (fields.encoding or fields.delta or fields.decoded_bytes)
    header = ChunkHeader(fields.incarnation, fields.attempt, fields.round, fields.sequence, fields.stream)
    lists = [
        np.array(values, kind)
        for values, kind in (
            (fields.run_first, np.uint64),
            (fields.run_pages, np.uint32),
            (fields.zero_first, np.uint64),
            (fields.zero_pages, np.uint32),
        )
    ]
    hashes = np.frombuffer(fields.page_hashes[: len(fields.page_hashes) // 8 * 8], "<u8")
    if fields.encoding < 0:
        return None  # an enum below zero has no place in the hash: every such chunk is refused before
    fields.chunk_hash = chunk_hash(header, *lists, hashes, UNPACKED if raw else packing)
    return fields.SerializeToString()


def _hashes_of(fields: PageChunk) -> bytes:
    """Of the pages as they are: raw, or decompressed by the libraries' plain functions, below a MiB."""
    data = fields.data
    pages = min(sum(fields.run_pages), 64)
    plain = data.ljust(pages * PAGE_BYTES, b"\0")[: pages * PAGE_BYTES]
    if fields.encoding or fields.delta:
        plain = bytes(pages * PAGE_BYTES)  # compressed zeros are what a fuzzer finds
    return bytes(page_hashes(plain).astype("<u8").tobytes()) if pages else b""


def _check_as_protobuf_reads_it(message: bytes, decoded: DecodedChunk) -> None:
    fields = PageChunk.FromString(message)
    header = decoded.header
    assert (header.incarnation, header.attempt, header.round_index) == (
        fields.incarnation, fields.attempt, fields.round,
    )  # fmt: skip
    assert (header.sequence, header.stream) == (fields.sequence, fields.stream)
    assert decoded.run_first.tolist() == list(fields.run_first)
    assert decoded.run_pages.tolist() == list(fields.run_pages)
    assert decoded.zero_first.tolist() == list(fields.zero_first)
    assert decoded.zero_pages.tolist() == list(fields.zero_pages)
    assert bytes(decoded.data) == fields.data
    assert decoded.packing.delta == fields.delta


# -- the ring walker -------------------------------------------------------------------------------

RING_SIZE = 16
RING_PAGES = 8
RING_AT = PAGE_BYTES
INDIRECT_AT = 3 * PAGE_BYTES
HEAD_BYTES = 4


def ring(data: bytes) -> None:
    """4 bytes of options, then the descriptor table, the available ring, indirect tables, and what is done."""
    if len(data) < HEAD_BYTES:
        return
    flags, first_page, index, steps = data[:HEAD_BYTES]
    memory = memoryview(bytearray(RING_PAGES * PAGE_BYTES))
    layout = layout_at(RING_AT, RING_SIZE)
    rest = memoryview(data)[HEAD_BYTES:]
    parts = (
        (layout.desc, 16 * RING_SIZE),
        (layout.avail, avail_bytes(RING_SIZE)),
        (INDIRECT_AT, PAGE_BYTES),
    )
    for at, size in parts:
        piece, rest = rest[:size], rest[size:]
        memory[at : at + len(piece)] = piece
    if flags & 1:  # available entries without guessing the index
        struct.pack_into("<H", memory, layout.avail + 2, index % (RING_SIZE + 2))
    walker = DeviceRing(
        memory, layout, event_idx=bool(flags & 2), indirect=not flags & 4,
        first_address=min(first_page % 4, 1) * PAGE_BYTES,
    )  # fmt: skip
    device = BalloonDevice(RING_PAGES)
    device.negotiate(device.features_offered)
    before = bytes(memory)
    _drive(walker, device, memory, rounds=1 + steps % 4, hold=bool(flags & 8))
    written = bytes(memory)
    used = slice(layout.used, layout.used + used_bytes(RING_SIZE))
    assert written[: used.start] + written[used.stop :] == before[: used.start] + before[used.stop :], (
        "the device wrote outside its used ring"
    )
    walker.close()


def _drive(walker: DeviceRing, device: BalloonDevice, memory: memoryview, *, rounds: int, hold: bool) -> None:
    read = reader(memory)
    queues: tuple[Callable[[], object], ...]
    for turn in range(rounds):
        chains = walker.pop_all(readable_bytes_max=64 << 10)
        assert walker.in_flight <= walker.size
        for chain in chains:
            for address, length in chain.readable + chain.writable:
                assert 0 < length <= len(memory) - address, "a buffer outside guest RAM"
        queues = (
            lambda chains=chains: device.process_inflate(chains, read),
            lambda chains=chains: device.process_deflate(chains, read),
            lambda chains=chains: device.process_report(chains),
            lambda chains=chains: [device.process_hint(chain, read) for chain in chains],
            lambda chains=chains: [device.process_stats(chain, read) for chain in chains],
        )
        for process in queues:
            process()
        heads = [chain.head for chain in chains]
        if hold and heads and walker.newest == heads[-1]:
            walker.unpop(heads.pop())
        if turn % 2:
            walker.push_many(heads)
        else:
            for head in heads:
                walker.push(head, 4)
        walker.publish()
        for error in walker.take_errors():
            assert error.kind in CHAIN_ERRORS, error
        for address, length in walker.take_stores():
            assert walker.layout.used <= address
            assert address + length <= walker.layout.used + used_bytes(walker.size)


# -- the vhost-user parser -------------------------------------------------------------------------

FEATURES = 1 << 32 | 0b111111
MESSAGE_HEAD = struct.Struct("<BBB")  # request, flags and descriptors, payload bytes


def vhost_user(data: bytes) -> None:
    """First byte 0: one message as bytes; else a conversation: request, flags, length, payload, and again."""
    memory = memoryview(bytearray(64 * PAGE_BYTES))
    host = MockBackend(memory, FEATURES)
    try:
        if data[:1] == b"\0":
            host.receive(data[2:], range(data[1] % 10 if len(data) > 1 else 0))
        else:
            _converse(host, data[1:])
    except VhostUserError:
        assert host.session.failed or not host.log or data[:1] == b"\0"
    except GuestProtocolError as error:
        if error.kind != "ring_layout":  # where its rings lie, the device looks itself
            raise
    host.disconnect()


def _converse(host: MockBackend, data: bytes) -> None:
    at = 0
    while at + MESSAGE_HEAD.size <= len(data):
        request, options, size = MESSAGE_HEAD.unpack_from(data, at)
        at += MESSAGE_HEAD.size
        payload = data[at : at + size]
        at += size
        flags = 1 | (options & 1) << 3 | (options & 2) << 1
        number = list(Request)[request % len(Request)] if options & 4 else request
        host.receive(Message(number, flags, payload).to_bytes(), range(options >> 4 & 3))
        host.replies.clear()
        decode(Message(number, flags, payload).to_bytes())


TARGETS: dict[str, Callable[[bytes], None]] = {"chunk": chunk, "ring": ring, "vhost_user": vhost_user}
INPUT_BYTES_MAX = {"chunk": 3 * PAGE_BYTES, "ring": 6144, "vhost_user": 1024}
