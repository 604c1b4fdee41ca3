"""`python -m tests.fuzz.seeds`: writes the corpus' first inputs, one well-formed example of everything each."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from migration.codec import ChunkHeader, Packing, encode_chunk, page_hashes
from migration.compression import Compressor
from migration.delta import Deltas
from migration.pages import PAGE_BYTES
from migration.pb.migration_pb2 import ENCODING_LZ4, ENCODING_ZSTD
from tests.fuzz.targets import RING_SIZE
from virtio.vhost_user import Request

CORPUS = Path(__file__).parent / "corpus"
NO_PFNS, NO_COUNTS = np.empty(0, np.uint64), np.empty(0, np.uint32)


def chunks() -> dict[str, bytes]:
    """Messages of every shape, all of pages of zeros."""
    header = ChunkHeader("0" * 32, 1, 1, 0)
    page = bytes(PAGE_BYTES)
    one = np.array([3], np.uint64), np.array([1], np.uint32)
    two = np.array([3, 9], np.uint64), np.array([1, 1], np.uint32)
    zero = np.array([20, 40], np.uint64), np.array([2, 1], np.uint32)
    none = NO_PFNS, NO_COUNTS
    both = bytes(2 * PAGE_BYTES)
    found = {
        "marker": encode_chunk(header, *none, *none, NO_PFNS, b""),
        "one page": encode_chunk(header, *one, *none, page_hashes(page), page),
        "page and zero runs": encode_chunk(header, *one, *zero, page_hashes(page), page),
        "zero runs of another stream": encode_chunk(
            ChunkHeader("x", 2, 7, 2**40, 3), *none, *zero, NO_PFNS, b""
        ),
    }
    for name, encoding in (("lz4", ENCODING_LZ4), ("zstd", ENCODING_ZSTD)):
        packed = Compressor(name).compress(np.frombuffer(both, np.uint8))
        assert packed is not None
        found[name] = encode_chunk(
            header, *two, *none, page_hashes(both), packed, Packing(encoding, b"", len(both))
        )
    words = np.zeros(4, np.uint64)
    deltas = Deltas(np.array([1]), np.array([2]), np.array([0, 8]), np.array([1, 3]))
    field = deltas.to_bytes()
    data = page + words.tobytes()
    found["delta"] = encode_chunk(header, *two, *none, page_hashes(both), data, Packing(0, field, 0))
    packed = Compressor("lz4").compress(np.frombuffer(data, np.uint8))
    assert packed is not None
    found["delta in lz4"] = encode_chunk(
        header, *two, *none, page_hashes(both), packed, Packing(ENCODING_LZ4, field, len(data))
    )
    return {f"{name}, as it is": b"\0" + message for name, message in found.items()} | {
        f"{name}, signed": b"\2" + message for name, message in found.items()
    }


def rings() -> dict[str, bytes]:
    """Descriptor tables with a chain each of the kinds that a driver makes."""

    def table(*rows: tuple[int, int, int, int]) -> bytes:
        return b"".join(struct.pack("<QIHH", *row) for row in rows).ljust(16 * RING_SIZE, b"\0")

    def available(*heads: int) -> bytes:
        return struct.pack("<HH", 0, len(heads)) + b"".join(struct.pack("<H", head) for head in heads)

    avail_bytes = 4 + 2 * RING_SIZE + 2
    at = 5 * PAGE_BYTES
    indirect = struct.pack("<QIHH", at, 8, 1, 1) + struct.pack("<QIHH", at, 4096, 2, 0)
    pfns = table((at, 1024, 0, 0), (at, 4, 0, 0))
    return {
        "two arrays of page numbers": bytes((0, 0, 0, 1)) + pfns + available(0, 1),
        "a chain of two": bytes((2, 0, 0, 1)) + table((at, 4, 1, 1), (at, 4096, 2, 0)) + available(0),
        "an indirect table": bytes((0, 1, 0, 3))
        + table((3 * PAGE_BYTES, 32, 4, 0))
        + available(0).ljust(avail_bytes, b"\0")
        + indirect,
        "a command and a block": bytes((8, 0, 0, 2))
        + table((at, 4, 0, 0), (at, 4096, 2, 0))
        + available(0, 1),
        "indices by the option": bytes((1, 0, 4, 1)) + pfns,
    }


def conversations() -> dict[str, bytes]:
    """What a front-end says, from SET_OWNER to running rings."""

    def says(request: Request, payload: bytes = b"", fds: int = 0) -> bytes:
        return struct.pack("<BBB", request, fds << 4, len(payload)) + payload

    u64, pair = struct.Struct("<Q").pack, struct.Struct("<II").pack
    begin = says(Request.SET_OWNER) + says(Request.GET_FEATURES) + says(Request.GET_PROTOCOL_FEATURES)
    protocol = says(Request.SET_PROTOCOL_FEATURES, u64(1 << 3 | 1 << 5 | 1 << 9))
    features = says(Request.SET_FEATURES, u64(1 << 32 | 7))
    region = struct.pack("<QQQQ", 0, 64 * PAGE_BYTES, 1 << 20, 0)
    memory = says(Request.SET_MEM_TABLE, pair(1, 0) + region, 1)
    addresses = struct.pack("<IIQQQQ", 0, 0, (1 << 20) + 4096, (1 << 20) + 12288, (1 << 20) + 8192, 0)
    vring = (
        says(Request.SET_VRING_NUM, pair(0, 16))
        + says(Request.SET_VRING_BASE, pair(0, 0))
        + says(Request.SET_VRING_ADDR, addresses)
        + says(Request.SET_VRING_CALL, u64(0), 1)
        + says(Request.SET_VRING_KICK, u64(0), 1)
    )
    config = says(Request.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(8))
    stop = says(Request.GET_VRING_BASE, pair(0, 0))
    whole = begin + protocol + features + memory + vring + config + stop
    channel = says(Request.SET_BACKEND_REQ_FD, b"", 1)
    one = struct.pack("<III", Request.GET_FEATURES, 1, 0)
    return {
        "features": b"\1" + begin + features,
        "a ring runs and stops": b"\1" + whole,
        "memory twice": b"\1" + begin + features + memory + vring + memory,
        "a channel": b"\1" + begin + protocol + channel,
        "one message": b"\0\0" + one,
    }


def main() -> None:
    """Writes them all; what is there stays."""
    for target, inputs in (("chunk", chunks()), ("ring", rings()), ("vhost_user", conversations())):
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (folder / name.replace(" ", "-").replace(",", "")).write_bytes(data)


if __name__ == "__main__":
    main()
