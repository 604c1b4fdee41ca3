"""Compression of a chunk's data: lz4 blocks or Zstandard frames, and when it is not worth trying.

Rule 1: what does not shrink goes as it is. After TRIES_MAX such chunks in a row the next ones are not tried at all,
        longer and longer, so that incompressible memory costs next to nothing.
Rule 2: nothing is decompressed before its size is known, checked against what the chunk says it must be, and
        bounded by a chunk's largest; what decompresses to another size is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lz4.block
import zstandard

from migration.errors import RemoteProtocolError
from migration.pb.migration_pb2 import ENCODING_LZ4, ENCODING_RAW, ENCODING_ZSTD

ENCODINGS = {"none": ENCODING_RAW, "lz4": ENCODING_LZ4, "zstd": ENCODING_ZSTD}
ZSTD_LEVEL = 1  # a link slower than a core compresses: higher levels are slower than most links
SHRUNK_MAX = 0.9  # of its size: less saved than this is not worth the other side's time
TRIES_MAX = 4  # chunks in a row that did not shrink
PAUSE_CHUNKS_MIN, PAUSE_CHUNKS_MAX = (
    16,
    256,
)  # chunks that go untried; memory that shrinks again is found in time


@dataclass(slots=True)
class Compressor:
    """One stream's. Counts what it did; its caller counts the time."""

    kind: str  # lz4 | zstd
    chunks: int = 0  # that were looked at, tried or not
    given_up_chunks: int = 0  # that went as they were: not tried, or not shrunk
    bytes_in: int = 0  # of all these chunks
    bytes_out: int = 0
    _failures: int = 0
    _untried: int = 0  # chunks still to pass before the next try
    _pause_chunks: int = PAUSE_CHUNKS_MIN
    _zstd: Any = field(default_factory=lambda: zstandard.ZstdCompressor(level=ZSTD_LEVEL))

    def compress(self, data: Any) -> bytes | None:
        """The compressed data (any buffer of bytes); None when it goes as it is."""
        self.chunks += 1
        self.bytes_in += data.nbytes
        packed = self._try(data)
        if packed is None:
            self.given_up_chunks += 1
        self.bytes_out += data.nbytes if packed is None else len(packed)
        return packed

    def _try(self, data: Any) -> bytes | None:
        if self._untried:
            self._untried -= 1
            return None
        packed: bytes = (
            lz4.block.compress(data, store_size=False) if self.kind == "lz4" else self._zstd.compress(data)
        )
        if len(packed) <= data.nbytes * SHRUNK_MAX:
            self._failures, self._pause_chunks = 0, PAUSE_CHUNKS_MIN
            return packed
        self._failures += 1
        if self._failures >= TRIES_MAX:
            self._untried = self._pause_chunks
            self._pause_chunks = min(self._pause_chunks * 2, PAUSE_CHUNKS_MAX)
        return None


def decompress(encoding: int, data: memoryview, *, size: int) -> memoryview:
    """The data, which must be of this size; RAW data as it is.

    Raises:
        RemoteProtocolError: it is not, or is no such data.
    """
    if encoding == ENCODING_RAW:
        if data.nbytes != size:
            raise RemoteProtocolError("chunk's lengths disagree", data=data.nbytes, expected=size)
        return data
    try:
        plain = _lz4(data, size) if encoding == ENCODING_LZ4 else _zstd(data, size)
    except (lz4.block.LZ4BlockError, zstandard.ZstdError, ValueError) as error:
        raise RemoteProtocolError("data does not decompress", size=size, data=data.nbytes) from error
    if len(plain) != size:
        raise RemoteProtocolError("data decompresses to another size", size=len(plain), expected=size)
    return memoryview(plain)


def _lz4(data: memoryview, size: int) -> bytes:
    plain: bytes = lz4.block.decompress(data, uncompressed_size=size)
    return plain


def _zstd(data: memoryview, size: int) -> bytes:
    # The frame says how much memory it wants, whatever we allow: that is read first.
    if zstandard.frame_content_size(data) != size:
        raise RemoteProtocolError("data decompresses to another size", expected=size)
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
