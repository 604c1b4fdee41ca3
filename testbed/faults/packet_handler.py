"""`python -m testbed.faults.packet_handler`: holds, changes or repeats packets which netfilter hands it.

Rule 1: it runs in the network namespace of the host whose packets come in; what comes to it was chosen by rules in
        the kernel, so that with 1 % of corrupted packets it sees 1 % of the packets.
Rule 2: delayed packets stay in order, whatever their jitter; reordering is delaying a few of them.
Rule 3: it says "ready" on its output when it holds the queue, and lets go of every packet when it is asked to end.
        It also ends when the host does.
Rule 4: its dice are seeded.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import struct
import sys
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Final

import numpy as np

from testbed.clock import now_ns
from testbed.faults.namespace import enter, in_namespace, namespace_of
from testbed.faults.nfqueue import PacketQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

IPV4_MIN_BYTES: Final = 20
TRANSPORT_HEADER_BYTES: Final = {
    socket.IPPROTO_TCP: (20, 16),
    socket.IPPROTO_UDP: (8, 6),
}  # -> checksum's place
ETHERTYPE_IPV4: Final = b"\x08\x00"
IDLE_S: Final = 3600.0  # nothing waits: only a packet or the end wakes it


class Ending:
    """Set by a signal, or by the end of the host's process; a descriptor for select either way."""

    def __init__(self, host_pid: int) -> None:
        self._asked = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.host = os.pidfd_open(host_pid)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def wait(self, queue: PacketQueue, timeout_s: float) -> bool:
        """Until a packet or the time has come; whether it is time to go on."""
        ready, _, _ = select.select([queue.fileno(), self._reader, self.host], [], [], timeout_s)
        self._asked |= self.host in ready
        return not self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True
        os.write(self._writer, b"!")


def hold(queue: PacketQueue, ending: Ending, *, delay_ns: int, jitter_ns: int, seed: int) -> None:
    """Every packet goes on `delay_ns` and up to `jitter_ns` more after it came, in order."""
    dice = np.random.default_rng(seed)
    # bounded: by the kernel, to QUEUE_PACKETS_MAX
    waiting: deque[tuple[NDArray[np.int64], NDArray[np.uint32]]] = deque()
    latest_ns = 0
    while True:
        next_ns = _let_go(queue, waiting, now_ns())
        if not ending.wait(queue, IDLE_S if next_ns < 0 else max(0, next_ns - now_ns()) / 1e9):
            break
        ids = queue.take()
        if not len(ids):
            continue
        due_ns = np.full(len(ids), now_ns() + delay_ns)
        if jitter_ns:
            due_ns += dice.integers(0, jitter_ns, len(ids), endpoint=True)
        due_ns = np.maximum(np.maximum.accumulate(due_ns), latest_ns)
        latest_ns = int(due_ns[-1])
        waiting.append((due_ns, ids))
    while len(ids := queue.take()):
        waiting.append((np.zeros(len(ids), np.int64), ids))
    if waiting:
        queue.accept_up_to(int(waiting[-1][1][-1]))


def _let_go(
    queue: PacketQueue, waiting: deque[tuple[NDArray[np.int64], NDArray[np.uint32]]], instant_ns: int
) -> int:
    """Accepts what is due; returns when the next packet is, -1 when none waits."""
    last = -1
    while waiting:
        due_ns, ids = waiting[0]
        count = int(np.searchsorted(due_ns, instant_ns, side="right"))
        if count:
            last = int(ids[count - 1])
        if count < len(ids):
            waiting[0] = (due_ns[count:], ids[count:])
            break
        waiting.popleft()
    if last >= 0:
        queue.accept_up_to(last)
    return int(waiting[0][0][0]) if waiting else -1


def corrupted(packet: bytes, dice: Random, *, fix_checksum: bool) -> bytes:
    """The packet with one bit of its payload flipped, or of its checksum where it has no payload.

    With `fix_checksum` the checksum is that of the changed payload, and only the application can notice.
    """
    if len(packet) < IPV4_MIN_BYTES:
        return packet
    start = (packet[0] & 15) * 4
    header_bytes, checksum_at = TRANSPORT_HEADER_BYTES.get(packet[9], (0, -1))
    if packet[9] == socket.IPPROTO_TCP and len(packet) > start + 12:
        header_bytes = (packet[start + 12] >> 4) * 4
    changed = bytearray(packet)
    payload = start + header_bytes
    if payload >= len(packet):
        if checksum_at >= 0 and not fix_checksum and start + checksum_at < len(packet):
            changed[start + checksum_at] ^= 1 << dice.randrange(8)
        return bytes(changed)
    place = dice.randrange(payload, len(packet))
    changed[place] ^= 1 << dice.randrange(8)
    if fix_checksum and checksum_at >= 0:
        _correct_checksum(changed, packet, start + checksum_at, place, start)
    return bytes(changed)


def _correct_checksum(changed: bytearray, before: bytes, checksum_at: int, place: int, start: int) -> None:
    """Incrementally (RFC 1624): only one 16-bit word is another."""
    word = start + (place - start) // 2 * 2
    old, new = (
        int.from_bytes((data[word : word + 2] + b"\0")[:2], "big") for data in (before, bytes(changed))
    )
    (checksum,) = struct.unpack_from(">H", before, checksum_at)
    total = (~checksum & 0xFFFF) + (~old & 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into(">H", changed, checksum_at, ~total & 0xFFFF)


def corrupt(queue: PacketQueue, ending: Ending, *, seed: int, fix_checksum: bool) -> None:
    """Every packet that comes here is changed by one bit."""
    dice = Random(seed)
    _serve(queue, ending, lambda number, packet: queue.accept(
        number, corrupted(packet, dice, fix_checksum=fix_checksum)
    ))  # fmt: skip


def duplicate(queue: PacketQueue, ending: Ending, wire: socket.socket, ethernet: bytes) -> None:
    """Every packet that comes here is put on the wire to this host once more, behind this Ethernet header."""

    def twice(number: int, packet: bytes) -> None:
        queue.accept(number)
        wire.send(ethernet + packet)

    _serve(queue, ending, twice)


def _serve(queue: PacketQueue, ending: Ending, handle: Callable[[int, bytes], None]) -> None:
    going_on = found = True
    while going_on or found:
        going_on = ending.wait(queue, IDLE_S if going_on else 0)
        found = False
        for number, packet in queue.take_payloads():
            handle(number, packet)
            found = True


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m testbed.faults.packet_handler", description=__doc__)
    parser.add_argument("mode", choices=("hold", "corrupt", "duplicate"))
    parser.add_argument(
        "--host-pid", type=int, required=True, help="a process in the host's network namespace"
    )
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delay-us", type=int, default=0)
    parser.add_argument("--jitter-us", type=int, default=0)
    parser.add_argument("--fix-checksum", action="store_true")
    parser.add_argument("--wire-namespace", default="", help="where the other end of this host's link is")
    parser.add_argument("--wire-interface", default="")
    parser.add_argument("--hardware-address", default="", help="of this host, in hexadecimal digits")
    parser.add_argument("--copies-from", default="", help="the hardware address that copies come from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Until SIGTERM."""
    options = arguments(argv)
    ending = Ending(options.host_pid)
    enter(namespace_of(options.host_pid))
    queue = PacketQueue(options.queue, payloads=options.mode != "hold")
    wire = _wire(options.wire_namespace, options.wire_interface) if options.mode == "duplicate" else None
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if wire is not None:
        header = bytes.fromhex(options.hardware_address + options.copies_from) + ETHERTYPE_IPV4
        duplicate(queue, ending, wire, header)
    elif options.mode == "corrupt":
        corrupt(queue, ending, seed=options.seed, fix_checksum=options.fix_checksum)
    else:
        delay_ns, jitter_ns = options.delay_us * 1000, options.jitter_us * 1000
        hold(queue, ending, delay_ns=delay_ns, jitter_ns=jitter_ns, seed=options.seed)
    queue.close()
    return 0


def _wire(namespace: str, interface: str) -> socket.socket:
    def open_it() -> socket.socket:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind((interface, 0))
        return wire

    return in_namespace(namespace, open_it)


if __name__ == "__main__":
    sys.exit(main())
