"""How the pages of a chunk stand in its data: raw pages first, then the changed words of deltas, then compressed.

Rule 1: page hashes are of the pages themselves: whatever packing does wrong, the hash of a page tells.
Rule 2: the size of everything follows from the chunk's small fields, and is checked before anything of it is made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from migration import delta
from migration.codec import DecodedChunk, Packing
from migration.compression import decompress
from migration.errors import RemoteProtocolError
from migration.pages import PAGE_BYTES, pfns_of
from migration.pb.migration_pb2 import ENCODING_RAW

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.compression import Compressor
    from migration.delta import Deltas
    from migration.pages import U8Array, U64Array


def pack(
    pages: U8Array, encoding: int, compressor: Compressor | None, deltas: Deltas | None, words: U64Array
) -> tuple[Packing, U8Array | bytes]:
    """The data of these raw pages (pages, 4096) and of the deltas' words; and what the message says of it."""
    data = pages.reshape(-1)
    if deltas is not None:
        data = np.concatenate((data, words.view(np.uint8)))
    field = deltas.to_bytes() if deltas is not None else b""
    packed = compressor.compress(data) if compressor is not None and data.size else None
    if packed is None:
        return Packing(ENCODING_RAW, field, 0), data
    return Packing(encoding, field, data.nbytes), packed


def unpack(chunk: DecodedChunk, read: Callable[[U64Array, memoryview], None]) -> DecodedChunk:
    """The chunk with its pages as `data`, as if it had come unpacked.

    `read` copies pages (ascending pfns) as they are stored here into a buffer: the older versions of its deltas.

    Raises:
        RemoteProtocolError: the packing is not consistent. (Whether it was right, `verify` tells.)
    """
    packing, pages = chunk.packing, chunk.data_page_count
    deltas = delta.parse(packing.delta, data_pages=pages) if packing.delta else None
    raw_pages, word_count = pages, 0
    if deltas is not None:
        raw_pages, word_count = pages - deltas.places.size, deltas.word_count
    size = raw_pages * PAGE_BYTES + word_count * delta.WORD_BYTES
    if packing.decoded_bytes != (size if packing.encoding != ENCODING_RAW else 0):
        raise RemoteProtocolError(
            "chunk's lengths disagree", decoded_bytes=packing.decoded_bytes, expected=size
        )
    data = decompress(packing.encoding, chunk.data, size=size)
    if deltas is not None:
        data = _assembled(chunk, deltas, data, raw_pages, read)
    return replace(chunk, data=data, packing=Packing())


def _assembled(
    chunk: DecodedChunk,
    deltas: Deltas,
    data: memoryview,
    raw_pages: int,
    read: Callable[[U64Array, memoryview], None],
) -> memoryview:
    places, raw_bytes = deltas.places, raw_pages * PAGE_BYTES
    older = np.empty((places.size, delta.PAGE_WORDS), np.uint64)
    read(pfns_of(chunk.run_first, chunk.run_pages)[places], older.data.cast("B"))
    delta.apply(deltas, older, np.frombuffer(data[raw_bytes:], "<u8"))
    pages = np.empty((chunk.data_page_count, PAGE_BYTES), np.uint8)
    is_raw = np.ones(chunk.data_page_count, np.bool_)
    is_raw[places] = False
    pages[places] = older.view(np.uint8)
    pages[is_raw] = np.frombuffer(data[:raw_bytes], np.uint8).reshape(-1, PAGE_BYTES)
    return pages.data.cast("B")
