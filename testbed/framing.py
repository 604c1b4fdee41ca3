"""How many bytes page payload becomes on its way to the wire.

Rule 1: the model is small and named part by part; whoever disputes a number finds the part that makes it.
Rule 2: what the counters do not tell (how scattered the pages were) is a bound, not a guess.
Rule 3: TCP_INFO counts the TCP byte stream: neither TCP nor IP headers are part of this model.

    payload   4096 per data page
    message   + 8 per page hash, + up to 8 per run of pages, + a header per chunk        (migration.proto)
    gRPC      + 5 per message: compressed flag and length                                (gRPC over HTTP/2)
    HTTP/2    + 9 per frame of at most 16 KiB                                            (RFC 9113, 4.1, 4.2)
    control   Open, Prepare with its vCPU state, Commit, Forget; settings, headers, window updates, pings
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PAGE_HASH_BYTES: Final = 8
RUN_BYTES_MAX: Final = 8  # varint page number below 2^35 (5 bytes) and varint count (2), rounded up
CHUNK_HEADER_BYTES: Final = 96  # incarnation, attempt, round, sequence, chunk hash, the tags and lengths
CHUNK_PAGES_MAX: Final = 256  # migration/codec.py
GRPC_PREFIX_BYTES: Final = 5
HTTP2_FRAME_HEADER_BYTES: Final = 9
HTTP2_FRAME_BYTES_MAX: Final = 16 * 1024
CONTROL_BYTES: Final = (
    64 * 1024
)  # a vCPU state is at most 16 KiB; the rest of a migration's control is smaller
TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes, both ends included."""

    least: int
    most: int

    def excess(self, counted: int) -> int:
        """How far `counted` lies outside, 0 when it does not."""
        return max(self.least - counted, counted - self.most, 0)


def message_bounds(data_pages: int, zero_pages: int, page_bytes: int, rounds: int) -> Bounds:
    """Bytes of the PageChunk messages that carry these pages."""
    body = data_pages * (page_bytes + PAGE_HASH_BYTES)
    chunks_least = -(-data_pages // CHUNK_PAGES_MAX)
    # At worst every page is a run of its own; a chunk is cut short at most once per round and per 256 runs.
    chunks_most = chunks_least + zero_pages // CHUNK_PAGES_MAX + 2 * rounds
    most = body + (data_pages + zero_pages) * RUN_BYTES_MAX + chunks_most * CHUNK_HEADER_BYTES
    return _with_tolerance(body, most)


def wire_bounds(grpc_bytes: int, data_pages: int, zero_pages: int, rounds: int) -> Bounds:
    """Bytes of the TCP stream that carries messages of `grpc_bytes` in total."""
    chunks = (data_pages + zero_pages) // CHUNK_PAGES_MAX + 2 * rounds
    frames = grpc_bytes // HTTP2_FRAME_BYTES_MAX + chunks
    expected = grpc_bytes + chunks * GRPC_PREFIX_BYTES + frames * HTTP2_FRAME_HEADER_BYTES
    return _with_tolerance(grpc_bytes, expected)


def _with_tolerance(least: int, most: int) -> Bounds:
    return Bounds(int(least * (1 - TOLERANCE)), int(most * (1 + TOLERANCE)) + CONTROL_BYTES)
