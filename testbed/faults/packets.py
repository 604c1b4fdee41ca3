"""Faults that need a process: chosen packets go to a packet handler beside the host (packet_handler.py).

Rule 1: the handler holds its queue before the first rule sends a packet there, and has let go of all it has before
        the rules are removed: the kernel drops what is queued in a namespace when a chain is taken out of it.
Rule 2: a handler is known by its process id and the instant of its start, so that nobody else is ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import psutil

from testbed.faults import nft, probing
from testbed.faults.errors import FaultError
from testbed.faults.fault import NetworkFault, is_same_network
from testbed.faults.namespace import in_namespace, inode_of, namespace_of
from testbed.faults.rules import TAKEN, taking

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.faults.fault import Direction, Port, Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host

READY_S: Final = 20.0  # a Python process starts in a second, on a loaded machine in some
END_S: Final = 5.0  # it lets its packets go and ends; then it is killed
QUEUE_FIRST: Final = 4700  # above what people choose by hand
QUEUES_MAX: Final = 200  # numbers to choose from: a fault has two
QUEUES: Final = "/proc/thread-self/net/netfilter/nfnetlink_queue"


class HandlerFault(NetworkFault):
    """Base of the kinds that need a packet handler."""

    @classmethod
    def lacks(cls) -> str:
        """Packet queues."""
        return probing.lacks("queues")

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:  # noqa: ARG003
        """Ends the handlers; how many packets went by them. A large packet is cut into many first."""
        return heal_handlers(undo)


def apply_handlers(
    target: Target,
    direction: Direction,
    *,
    mode: str,
    options_of: Callable[[Port, int], Sequence[str]],
    numbers_of: Callable[[int], Sequence[int] | None],
    only: str = "",
) -> Undo:
    """A handler and a table at every receiver; what `heal_handlers` needs."""
    parts: list[dict[str, Any]] = []
    with ExitStack() as undoing:
        for index, (port, addresses) in enumerate(target.receivers(direction)):
            seed = target.seed + index
            queue = _free_queue(port.pid)
            pid = _start(mode, port, queue, [*options_of(port, seed), "--seed", str(seed)], target.label)
            part = {
                "pid": port.pid, "inode": inode_of(port.pid), "table": target.label,
                "handler": pid, "started": psutil.Process(pid).create_time(),
            }  # fmt: skip
            undoing.callback(heal_handlers, {"handlers": [part]})
            nft.load(port.pid, nft.table(target.label, taking(addresses, numbers_of(seed), "", only=only)))
            nft.queue_chain(port.pid, target.label, TAKEN, queue)
            parts.append(part)
        undoing.pop_all()
    return {"handlers": parts}


def heal_handlers(undo: Undo) -> dict[str, Any]:
    """Deletes the tables, ends the handlers; how many packets went through them."""
    packets = 0
    for entry in undo["handlers"]:
        _end(entry["handler"], entry["started"])
        if is_same_network(entry["pid"], entry["inode"]) and nft.has_table(entry["pid"], entry["table"]):
            packets += nft.counted_packets(entry["pid"], entry["table"])
            nft.delete_table(entry["pid"], entry["table"])
    return {"packets": packets}


def _free_queue(pid: int) -> int:
    def held() -> set[int]:
        with open(QUEUES, encoding="ascii") as queues:  # noqa: PTH123 - of this thread's namespace
            return {int(line.split()[0]) for line in queues}

    try:
        taken = in_namespace(namespace_of(pid), held)
    except OSError as error:
        raise FaultError(f"the kernel has no packet queues (nfnetlink_queue): {error.strerror}") from error
    free = next((number for number in range(QUEUE_FIRST, QUEUE_FIRST + QUEUES_MAX) if number not in taken), 0)
    if not free:
        raise FaultError(f"all of {QUEUES_MAX} packet queues are in use: heal some faults first")
    return free


def _start(mode: str, port: Port, queue: int, options: Sequence[str], label: str) -> int:
    """Starts a handler, outside of any parent's care: it ends when it is healed, or with its host."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    command = [
        sys.executable, "-m", "testbed.faults.packet_handler", mode, "--host-pid", str(port.pid),
        "--queue", str(queue), *options,
    ]  # fmt: skip
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)]
        environment = {**os.environ, "BALLAST_FAULT": label}
        pid = os.posix_spawn(sys.executable, command, environment, file_actions=actions, setsid=True)
    finally:
        os.close(writer)
    said, piece = b"", b"?"
    while piece and not said.startswith(b"ready\n"):
        ready, _, _ = select.select([reader], [], [], READY_S)
        piece = os.read(reader, 1 << 16) if ready else b""
        said += piece
    os.close(reader)
    if not said.startswith(b"ready\n"):
        _end(pid, psutil.Process(pid).create_time())
        raise FaultError(f"the packet handler did not start: {_last_line(said)}")
    return pid


def _end(pid: int, started: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() != started:
            return
        process.terminate()
        try:
            process.wait(END_S)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(END_S)


def _last_line(said: bytes) -> str:
    lines = said.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else json.dumps("it said nothing")
