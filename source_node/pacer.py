"""The bandwidth limit: when the next message may go.

Rule 1: one pacer serves all streams of an attempt and all its rounds; what is limited is their sum.
Rule 2: what counts is bytes on the wire. A message is known by its own size, which is multiplied with what the
        kernel's counters of the very connection say that a message's byte costs there (`overhead`).
Rule 3: nothing is saved up: a sender that paused goes on at the limit, not above it.
"""

from __future__ import annotations

import threading

from host.clock import now_ns

OVERHEAD_MAX = 2.0  # a measurement beyond it is of retransmissions of a link that is breaking, not of framing

MEASURED_BYTES_MIN = 1 << 20


class Pacer:
    """Thread-safe."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._overhead = 1.0
        self._lock = threading.Lock()
        self._until_ns = 0

    @property
    def overhead(self) -> float:
        """Wire bytes per message byte."""
        return self._overhead

    def measured(self, message_bytes: int, wire_bytes: int) -> None:
        """So many bytes of messages were so many on the wire, since the attempt began.

        The first megabyte is not enough: what gRPC still holds back, and the connection's opening, would count.
        """
        if message_bytes > MEASURED_BYTES_MIN:
            self._overhead = min(max(wire_bytes / message_bytes, 1.0), OVERHEAD_MAX)

    def reserve(self, message_bytes: int) -> int:
        """The next slot, for a message of this size: the instant (CLOCK_MONOTONIC, ns) from which it may go."""
        cost_ns = int(message_bytes * self._overhead * 1e9 / self.bytes_per_second)
        with self._lock:
            start_ns = max(self._until_ns, now_ns())
            self._until_ns = start_ns + cost_ns
            return start_ns
