"""What a node process sets up for itself: its logs, and that it does not outlive its starter."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

import structlog

PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the starting thread's process ends (prctl(2)).

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
