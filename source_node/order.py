"""What the testbed asked the source for, after it was checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from migration.convergence import ThrottleSteps
from migration.errors import LocalProtocolError
from migration.handover import NO_STOP, LastStop
from migration.rounds import Limits, OnStall, Surrender

if TYPE_CHECKING:
    from migration.events import Skip
    from migration.identity import AttemptKey
    from migration.pb import node_pb2

COMPRESSIONS = ("none", "lz4", "zstd")


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, checked."""

    key: AttemptKey
    dest_address: str
    skip: Skip
    tracker: str
    tracker_reason: str
    integrity: str
    hint_wait_ms: int
    limits: Limits
    rehearsal: bool = False
    streams: int = 1  # of pages
    compression: str = "none"
    delta_cache_bytes: int = 0  # 0: no deltas
    dest_server_name: str = ""  # of the destination's certificate; "": plain text
    last_stop: LastStop = NO_STOP  # on this host, as far as it was measured
    unsafe_clear_dirty_log_at_hint: bool = False  # source_node/hint_rule.py

    @property
    def peer(self) -> str:
        """The destination as AttemptNote keeps it: its address, and the name of its certificate if it has one."""
        return f"{self.dest_address} {self.dest_server_name}".rstrip()


def limits_of(request: node_pb2.MigrateRequest) -> Limits:
    """The request's limits; a word that is missing is the default, 0 is no limit.

    Raises:
        ValueError: a value is not possible, or two of them exclude each other.
    """
    throttle = (
        request.throttle_start_percent,
        request.throttle_increment_percent,
        request.throttle_maximum_percent,
    )
    try:
        return Limits(
            rounds_max=request.rounds_max,
            downtime_limit_ms=request.downtime_limit_ms,
            timeout_ms=request.timeout_ms or math.inf,
            # Limits refuses what is none of the words.
            on_rounds_max=cast("Surrender", request.on_rounds_max or "switch"),
            on_timeout=cast("Surrender", request.on_timeout or "cancel"),
            on_stall=cast("OnStall", request.on_stall or "none"),
            throttle=ThrottleSteps(*throttle) if any(throttle) else None,
            bandwidth=request.bandwidth_bytes_per_second or None,
            link_timeout_ms=request.link_timeout_ms,
            link_timeout_paused_ms=(
                request.link_timeout_paused_ms if request.HasField("link_timeout_paused_ms") else None
            ),
        )
    except LocalProtocolError as error:
        raise ValueError(str(error)) from error


def compression_of(request: node_pb2.MigrateRequest) -> str:
    """The request's compression. Raises ValueError when there is none of that name."""
    compression = request.compression or "none"
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression {compression!r} is none of {', '.join(COMPRESSIONS)}")
    return compression
