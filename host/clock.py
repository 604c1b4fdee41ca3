"""The one place where this package reads a clock.

CLOCK_MONOTONIC is one clock for all processes of a machine, containers included, so instants of both
hosts of a local run may be compared. Durations are taken from it always, instants only for the history.
"""

from __future__ import annotations

import time


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    return time.monotonic_ns()


def thread_cpu_ns() -> int:
    """CPU time of the calling thread so far, in nanoseconds."""
    return time.thread_time_ns()
