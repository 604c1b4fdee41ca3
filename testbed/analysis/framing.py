"""How many bytes page payload becomes on its way to the wire: every layer by its name.

Rule 1: the model is small and named part by part; whoever disputes a number finds the part that makes it.
Rule 2: what was counted is taken as counted; a layer that nobody counts is bounded by what its protocol can make
        of the layer above. What neither explains is `unexplained`, and never spread over the layers.
Rule 3: nothing here measures or judges: figures in, figures out.

    payload      4096 per data page
    encoding     what compression and deltas take off it (negative)
    chunks       + 8 per page hash, + up to 8 per run of pages, + a header per chunk       (migration.proto)
    control      Open, Prepare with its vCPU state, Commit, Forget
    gRPC         + 5 per message: compressed flag and length                               (gRPC over HTTP/2)
    HTTP/2       + 9 per frame of at most 16 KiB; settings, headers, window updates, pings (RFC 9113, 4.1, 4.2)
    TLS          + 22 per record of at most 16 KiB: header, type, tag; and a handshake     (RFC 8446, 5.2)
    = the TCP stream, as TCP_INFO counts it
    again        bytes that TCP sent once more
    TCP/IP       + 20 IPv4 (40 IPv6) + 20 TCP + 12 time stamps per packet                  (RFC 791, 9293, 7323)
    Ethernet     + 14 per packet
    others       what else this host's processes said by the network, such as to the testbed
    = the interfaces
A packet is what the interface is handed: up to 64 KiB with segmentation offload, an MTU without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PAGE_HASH_BYTES: Final = 8
RUN_BYTES_MAX: Final = 8  # varint page number below 2^35 (5 bytes) and varint count (2), rounded up
CHUNK_HEADER_BYTES: Final = 96  # incarnation, attempt, round, sequence, chunk hash, the tags and lengths
CHUNK_PAGES_MAX: Final = 256  # of a packed chunk, the smaller kind (migration/codec.py)
GRPC_PREFIX_BYTES: Final = 5
HTTP2_FRAME_HEADER_BYTES: Final = 9
HTTP2_FRAME_BYTES: Final = 16 * 1024  # unless the peer allows more, which only saves headers
HTTP2_ANSWER_BYTES: Final = (
    160  # per message at most: an acknowledgement, window updates, a ping and its answer
)
TLS_RECORD_BYTES: Final = 16 * 1024 - 100  # gRPC leaves room for the largest overhead
TLS_OVERHEAD_BYTES: Final = 22
TLS_HANDSHAKE_BYTES: Final = 16 * 1024  # certificates of both sides, session tickets
IP_HEADER_BYTES: Final = {4: 20, 6: 40}
TCP_HEADER_BYTES: Final = 32  # with time stamps
SACK_BYTES_MAX: Final = 28  # three blocks beside time stamps, padded; only while something is missing
ETHERNET_HEADER_BYTES: Final = 14
# Connection set-up, HTTP/2 settings and headers of a dozen calls, address resolution, neighbour discovery.
FIXED_BYTES: Final = 16 * 1024
TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes, both ends included."""

    least: int
    most: int

    def excess(self, counted: int) -> int:
        """How far `counted` lies above (positive) or below (negative), 0 when it does not."""
        return max(counted - self.most, 0) - max(self.least - counted, 0)


def chunk_bounds(data_pages: int, zero_pages: int, rounds: int, messages: int) -> Bounds:
    """Bytes of the PageChunk messages that carry these pages, beyond the pages' own."""
    hashes = data_pages * PAGE_HASH_BYTES
    # At worst every page is a run of its own. A chunk is cut short at most once per round and per 256 runs; the
    # messages that were counted are at least as many as that takes.
    chunks = max(messages, -(-data_pages // CHUNK_PAGES_MAX) + zero_pages // CHUNK_PAGES_MAX + 2 * rounds)
    runs = (data_pages + zero_pages) * RUN_BYTES_MAX
    return Bounds(hashes, hashes + runs + chunks * CHUNK_HEADER_BYTES)


def http2_bounds(grpc_bytes: int, messages: int) -> Bounds:
    """What HTTP/2 adds to the gRPC bytes that a host sends: frame headers, and a little for each message."""
    frames = grpc_bytes // HTTP2_FRAME_BYTES + 2 * messages
    return Bounds(0, frames * HTTP2_FRAME_HEADER_BYTES + messages * HTTP2_ANSWER_BYTES + FIXED_BYTES)


def answer_bounds(grpc_bytes: int, messages: int) -> Bounds:
    """The whole stream in the other direction: acknowledgements, and a window update for each frame at worst."""
    frames = grpc_bytes // HTTP2_FRAME_BYTES + 2 * messages
    per_frame = HTTP2_FRAME_HEADER_BYTES + 4 + TLS_OVERHEAD_BYTES
    return Bounds(0, frames * per_frame + messages * HTTP2_ANSWER_BYTES + FIXED_BYTES + TLS_HANDSHAKE_BYTES)


def tls_bounds(plain_bytes: int, messages: int) -> Bounds:
    """What TLS adds: full records at least, a short one or two per message at most; the handshake."""
    full = plain_bytes // TLS_RECORD_BYTES
    return Bounds(
        full * TLS_OVERHEAD_BYTES, (full + 4 * messages + 64) * TLS_OVERHEAD_BYTES + TLS_HANDSHAKE_BYTES
    )


def packet_header_bytes(ip_version: int) -> int:
    """TCP and IP headers of one packet."""
    return IP_HEADER_BYTES[ip_version] + TCP_HEADER_BYTES


def tolerated(counted: int) -> int:
    """How many unexplained bytes are no reason to distrust a count: 1 %, and what a connection costs."""
    return int(counted * TOLERANCE) + FIXED_BYTES
