"""`python -m linux_guest`: a stock Linux guest and the process that holds it, in place of a guest agent.

Rule 1: it ends on `shutdown`, on SIGTERM or SIGINT, when the guest ends, and, if asked to, when the process that
        started it dies; in every case but a kill nothing of the guest is left.
Rule 2: exit codes: 0 an ordinary end, 1 the guest failed, 2 usage, 3 this machine cannot hold such a guest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from linux_guest import workloads
from linux_guest.agent import Agent, Beats
from linux_guest.errors import FreezerUnavailableError, LinuxGuestError, PackagesMissingError, WorkloadError
from linux_guest.frame_table import FrameTable
from linux_guest.freezer import make_group
from linux_guest.launch import die_with_starter
from linux_guest.ram_file import RamFile
from linux_guest.uml import LinuxGuest

if TYPE_CHECKING:
    from collections.abc import Sequence

FAILED, USAGE, CANNOT = 1, 2, 3
DEVICE_S: Final = 60.0  # the node's start, on a busy machine
LOOK_S: Final = 0.02  # between two looks for the node's socket
LISTENING: Final = "00010000"  # __SO_ACCEPTCON among the flags in /proc/net/unix
RUN_LABEL: Final = "BALLAST_RUN"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one Linux guest; the exit code."""
    options = _parser().parse_args(arguments)
    if options.die_with_parent:
        die_with_starter()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda *_: sys.exit(0)
        )  # until the agent serves; the stack undoes what there is
    try:
        chosen = _load(options.workloads)
        return _run(options, chosen)
    except (OSError, LinuxGuestError, ValueError) as error:
        structlog.get_logger().error("guest_failed", reason=" ".join(str(error).split()))
        if isinstance(error, PackagesMissingError | FreezerUnavailableError):
            return CANNOT
        return USAGE if isinstance(error, WorkloadError | ValueError) else FAILED


def _run(options: argparse.Namespace, chosen: list[dict[str, Any]]) -> int:
    log = structlog.get_logger()
    with ExitStack() as stack:
        directory = options.agent_socket.with_suffix(".linux")
        directory.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, directory)
        group = make_group(f"ballast-{os.environ.get(RUN_LABEL, 'alone')}-{os.getpid()}")
        stack.callback(group.remove)
        beats = Beats(options.beats)
        stack.callback(beats.close)
        options.oracle.touch(mode=0o600)  # a Linux guest logs nothing: its markers are checked in place
        _await_device(options.vhost_socket)
        guest = LinuxGuest(
            directory,
            memory_bytes=options.memory,
            vhost_socket=options.vhost_socket,
            group=group,
            on_beat=beats,
        )
        stack.callback(guest.end, power_off=False)
        guest.start()
        guest.wait_until_up()
        guest.load_balloon()
        ram = RamFile(guest.open_ram())
        stack.callback(ram.close)
        frames = FrameTable.of(guest, ram)
        frames.check_against(guest)
        log.info("guest_booted", pid=guest.pid, pages=ram.size // 4096)
        agent = Agent(
            options.agent_socket,
            guest=guest,
            group=group,
            ram=ram,
            frames=frames,
            workloads=workloads.set_up(guest, ram, chosen),
            beats=beats,
            markers_path=options.markers,
        )
        stack.callback(agent.close)
        return _serve(agent, guest)


def _serve(agent: Agent, guest: LinuxGuest) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.ask_to_end())
    signal.set_wakeup_fd(agent.wake_fd, warn_on_full_buffer=False)

    def watch() -> None:
        guest.wait_for_end()
        agent.look()

    threading.Thread(target=watch, name="watch-guest", daemon=True).start()
    asked = agent.serve()
    signal.set_wakeup_fd(-1)
    if not asked:
        structlog.get_logger().error("guest_ended", reason=guest.last_words())
    return 0 if asked else FAILED


def _await_device(socket_path: Path) -> None:
    """Until somebody listens there: the guest's kernel tries once. Looking does not connect.

    Raises:
        TimeoutError: nobody did.
    """
    deadline = time.monotonic() + DEVICE_S
    while not _listens(socket_path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no balloon device listens at {socket_path}")
        time.sleep(LOOK_S)


def _listens(socket_path: Path) -> bool:
    for line in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[3] == LISTENING and fields[7] == str(socket_path):
            return True
    return False


def _load(path: Path) -> list[dict[str, Any]]:
    """The workloads of the JSON file. Raises OSError, ValueError, WorkloadError."""
    document = json.loads(path.read_bytes())
    chosen = document.get("workloads") if isinstance(document, dict) else None
    if not isinstance(chosen, list) or not all(isinstance(workload, dict) for workload in chosen):
        raise WorkloadError(f"{path}: no list of workloads")
    workloads.check_options(chosen)
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="linux_guest", description="A stock Linux guest and its holder.")
    parser.add_argument("--name", required=True, help="for the log")
    parser.add_argument("--memory", required=True, type=int, metavar="BYTES", help="guest RAM, whole MiB")
    parser.add_argument("--seed", required=True, type=int, help="of the run; nothing here is drawn from it")
    parser.add_argument("--vhost-socket", required=True, type=Path, help="where the balloon device listens")
    parser.add_argument("--agent-socket", required=True, type=Path, help="where this agent listens")
    parser.add_argument(
        "--beats", required=True, type=Path, metavar="FILE", help="append-only: the guest's clock"
    )
    parser.add_argument("--oracle", required=True, type=Path, metavar="FILE", help="made, and left empty")
    parser.add_argument(
        "--markers", required=True, type=Path, metavar="FILE", help="where the markers' pages were"
    )
    parser.add_argument("--workloads", required=True, type=Path, metavar="FILE", help="JSON")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process dies")
    return parser


if __name__ == "__main__":
    sys.exit(main())
