"""The one place where the testbed looks at a clock.

Rule 1: durations and the order of events come from CLOCK_MONOTONIC, which both nodes of one machine share.
Rule 2: wall-clock time only names run directories; nothing is computed from it.
"""

import time
from datetime import UTC, datetime


def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    return time.monotonic_ns()


def utc_stamp() -> str:
    """The wall-clock time as it appears in the names of run directories, to the second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
