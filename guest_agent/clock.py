"""Time, as the guest sees it.

Rule 1: guest time stands still while the guest is paused: no workload catches up in a burst afterwards.
Rule 2: guest time is part of the vCPU state; on the other host it goes on where it stood.
Rule 3: beats are stamped with the host's CLOCK_MONOTONIC, never with guest time: they must show the pause.
"""

from __future__ import annotations

import threading
import time

__all__ = ["GuestClock", "host_now_ns"]


def host_now_ns() -> int:
    """CLOCK_MONOTONIC of this host in nanoseconds, shared by all its processes."""
    return time.monotonic_ns()


class GuestClock:
    """A monotonic clock in nanoseconds that can be stopped. It starts stopped, at `now_ns`."""

    def __init__(self, now_ns: int = 0) -> None:
        self._lock = threading.Lock()
        self._now_ns = now_ns
        self._started_at_ns: int | None = None

    def now_ns(self) -> int:
        """Guest time."""
        with self._lock:
            if self._started_at_ns is None:
                return self._now_ns
            return self._now_ns + time.monotonic_ns() - self._started_at_ns

    def start(self) -> None:
        """Let guest time go on. Idempotent."""
        with self._lock:
            if self._started_at_ns is None:
                self._started_at_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Let guest time stand still. Idempotent."""
        with self._lock:
            if self._started_at_ns is not None:
                self._now_ns += time.monotonic_ns() - self._started_at_ns
                self._started_at_ns = None
