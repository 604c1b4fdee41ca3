"""What a node process sets up for itself: its logs, and that it does not outlive its starter."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

import structlog

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BLOCK_BYTES_MAX = 32 << 20  # glibc's own upper limit for the threshold
# A window of chunks comes and goes in it; a node's own memory at 8 GiB stays below 130 MiB.
KEPT_TOP_BYTES = 48 << 20


def configure_logging() -> None:
    """JSON lines on stderr: one event a line, bound context, monotonic order by the reader's file."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def keep_large_blocks() -> None:
    """Have malloc keep freed megabytes, for all threads together, instead of giving each one back (mallopt(3)).

    Every chunk is several allocations of its size, in gRPC's core and here. By default each is mapped, faulted in
    page by page, and unmapped. And every thread takes from an arena of its own, while a chunk is made by one
    thread and freed by another: it goes from cold memory to cold memory (benchmarks/RESULTS.md). Other C libraries
    than glibc have no mallopt; there nothing changes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_TOP_BYTES)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the thread that started us ends (prctl(2)).

    Raises:
        OSError: the kernel refused.
        SystemExit: the starter is gone already.
    """
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if os.getppid() != parent or parent == 1:
        sys.exit("the process that started this one is gone")
