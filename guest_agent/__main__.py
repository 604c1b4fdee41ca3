"""`python -m guest_agent`: one guest and the process that holds it.

Rule 1: the process ends on `shutdown`, on SIGTERM or SIGINT, when a guest thread failed, and, if asked to, when
        the process that started it dies; in every case but a kill its sockets and its memory are gone afterwards.
Rule 2: exit codes: 0 an ordinary end, 1 the guest failed, 2 usage.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from guest_agent.agent import Agent
from guest_agent.arrays import PAGE_BYTES
from guest_agent.balloon_options import BalloonOptions
from guest_agent.boot import MemoryLayout
from guest_agent.errors import WorkloadError
from guest_agent.machine import MachineOptions
from guest_agent.ram import MEMORY_BYTES_MAX
from guest_agent.workloads import build_workloads

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, USAGE = 1, 2
PR_SET_PDEATHSIG = 1
# CPython hands the interpreter lock over every 5 ms by default: three guest threads would stutter the 2 ms beats.
SWITCH_INTERVAL_S = 0.0005


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one guest agent; the exit code."""
    options = _parser().parse_args(arguments)
    if options.die_with_parent:
        _die_with_parent()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _log_json_lines(options.name)
    try:
        workloads, balloon = (None, BalloonOptions()) if options.standby else _load_guest(options.workloads)
    except (OSError, ValueError, WorkloadError) as error:
        return _complain(f"{options.workloads}: {error}", USAGE)
    machine_options = MachineOptions(
        name=options.name,
        memory_bytes=options.memory,
        seed=options.seed,
        vhost_socket=options.vhost_socket,
        beats=options.beats,
        oracle=options.oracle,
    )
    try:
        agent = Agent(machine_options, options.agent_socket, workloads, balloon)
    except OSError as error:
        return _complain(f"{options.agent_socket}: {error.strerror}", FAILED)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.ask_to_end())
    # The kernel may deliver the signal to a guest thread; only this wakes the main thread to handle it.
    signal.set_wakeup_fd(agent.wake_fd, warn_on_full_buffer=False)
    return agent.run()


def _complain(reason: str, code: int) -> int:
    print(f"guest_agent: {reason}", file=sys.stderr)  # noqa: T201 - before there is a log
    return code


def _memory_bytes(text: str) -> int:
    """Guest RAM as an option: whole pages, and room for more than the guest's own tables."""
    memory_bytes = int(text)
    if memory_bytes <= 0 or memory_bytes % PAGE_BYTES or memory_bytes > MEMORY_BYTES_MAX:
        raise argparse.ArgumentTypeError(f"{text} is not 1 to 2^32 whole pages of {PAGE_BYTES} bytes")
    try:
        MemoryLayout.for_pages(memory_bytes // PAGE_BYTES)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return memory_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="guest_agent", description="A guest and the process that holds it.")
    parser.add_argument("--name", required=True, help="for the log")
    parser.add_argument("--memory", required=True, type=_memory_bytes, metavar="BYTES", help="guest RAM")
    parser.add_argument("--seed", required=True, type=int, help="of the run")
    parser.add_argument(
        "--vhost-socket", required=True, type=Path, help="where the node's balloon device listens"
    )
    parser.add_argument(
        "--agent-socket", required=True, type=Path, help="where this agent listens for its node"
    )
    parser.add_argument(
        "--beats", required=True, type=Path, metavar="FILE", help="append-only: the guest's beats"
    )
    parser.add_argument(
        "--oracle", required=True, type=Path, metavar="FILE", help="append-only: what was written"
    )
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process dies")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--workloads",
        type=Path,
        metavar="FILE",
        help="JSON: boot a guest with these workloads and this balloon",
    )
    what.add_argument("--standby", action="store_true", help="wait for a guest to be restored here")
    return parser


def _load_guest(path: Path) -> tuple[list[dict[str, Any]], BalloonOptions]:
    """The workloads of the JSON file, and what its balloon driver is to be ("balloon", optional).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not {"workloads": [{"name": ...}, ...], "balloon": {...}}.
        WorkloadError: a workload is unknown, or one of its options is.
    """
    document = json.loads(path.read_bytes())
    workloads = document.get("workloads") if isinstance(document, dict) else None
    if not isinstance(workloads, list) or not all(isinstance(workload, dict) for workload in workloads):
        raise ValueError('expected {"workloads": [{"name": ...}, ...]}')
    build_workloads(workloads)  # refuses what no workload knows, before anything is started
    balloon = document.get("balloon", {})
    if not isinstance(balloon, dict):
        raise ValueError('expected {"balloon": {...}}')  # noqa: TRY004 - one kind of error for a bad file
    return workloads, BalloonOptions.from_dict(balloon)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the thread that started this process ends."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before we had asked
        sys.exit(0)


def _log_json_lines(name: str) -> None:
    """Events as JSON lines on stderr."""
    structlog.configure(
        processors=[
            lambda _, __, event: {"agent": name, **event},
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    sys.exit(main())
