"""A netfilter queue of this network namespace, read many packets at a time.

Rule 1: one system call takes up to BATCH packets (recvmmsg) and one message lets any number of them go on, so
        that a plain process keeps up with a gigabit link in packets of 1500 bytes.
Rule 2: packets are named by the kernel's ids, which rise; what happens to payloads is the caller's business.
Rule 3: when the process ends, however it ends, the kernel lets new packets pass (the rule says "bypass").

Numbers are those of linux/netfilter/nfnetlink_queue.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BATCH: Final = 512
META_SLOT_BYTES: Final = 512  # a message without payload is about 120 bytes
PACKET_SLOT_BYTES: Final = (1 << 16) + META_SLOT_BYTES
RECEIVE_BUFFER_BYTES: Final = (
    64 << 20
)  # a second of a gigabit link in small packets, as the kernel accounts them
QUEUE_PACKETS_MAX: Final = 1 << 18  # at 10 Gbit/s and 300 ms; beyond it the kernel drops, as a router does

NETLINK_NETFILTER: Final = 12
SOL_NETLINK: Final = 270
NETLINK_NO_ENOBUFS: Final = 5
SO_RCVBUFFORCE: Final = 33
SUBSYSTEM: Final = 3 << 8
MSG_PACKET, MSG_VERDICT, MSG_CONFIG, MSG_VERDICT_BATCH = 0, 1, 2, 3
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR: Final = 2
CFG_CMD, CFG_PARAMS, CFG_QUEUE_MAXLEN, CFG_MASK, CFG_FLAGS = 1, 2, 3, 4, 5
CMD_BIND: Final = 1
COPY_META, COPY_PACKET = 1, 2
FLAG_GSO: Final = 4  # hand large packets over as they are; without it the kernel cuts them first
ATTR_VERDICT, ATTR_PAYLOAD = 2, 10
VERDICT_ACCEPT: Final = 1

HEADER: Final = struct.Struct("=IHHII")
GENERIC: Final = struct.Struct(">BBH")
ATTRIBUTE: Final = struct.Struct("=HH")
# nlmsghdr 16, nfgenmsg 4, and the first attribute is always the packet's header, with the id in front.
ID_OFFSET: Final = HEADER.size + GENERIC.size + ATTRIBUTE.size


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32),
        ("iovec", ctypes.c_void_p), ("iovec_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )  # fmt: skip


class _MultiMessage(ctypes.Structure):
    _fields_ = (("header", _Message), ("length", ctypes.c_uint32))


_libc = ctypes.CDLL(None, use_errno=True)


class PacketQueue:
    """One bound queue. With `payloads` the packets' bytes are copied here, cut to the link's size."""

    def __init__(self, number: int, *, payloads: bool) -> None:
        self.number = number
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        self._configure(CFG_CMD, struct.pack(">BxH", CMD_BIND, socket.AF_INET))
        self._configure(CFG_PARAMS, struct.pack(">IB", 0xFFFF if payloads else 0, 2 if payloads else 1))
        self._configure(CFG_QUEUE_MAXLEN, struct.pack(">I", QUEUE_PACKETS_MAX))
        if not payloads:
            flags = struct.pack(">I", FLAG_GSO)
            self._send(MSG_CONFIG, _attribute(CFG_MASK, flags) + _attribute(CFG_FLAGS, flags), ask=True)
        slots, size = (64, PACKET_SLOT_BYTES) if payloads else (BATCH, META_SLOT_BYTES)
        self._slots = np.zeros((slots, size), dtype=np.uint8)
        self._iovecs = (_Iovec * slots)()
        self._messages = (_MultiMessage * slots)()
        for index in range(slots):
            self._iovecs[index].base = self._slots.ctypes.data + index * size
            self._iovecs[index].length = size
            self._messages[index].header.iovec = ctypes.addressof(self._iovecs[index])
            self._messages[index].header.iovec_count = 1

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def close(self) -> None:
        """Unbinds; what is still held is dropped by the kernel, so release first."""
        self._socket.close()

    def take(self) -> NDArray[np.uint32]:
        """The ids of the packets that wait, ascending, at most a batch; none when none waits."""
        count = self._receive()
        if not count:
            return np.empty(0, np.uint32)
        ids = np.ascontiguousarray(self._slots[:count, ID_OFFSET : ID_OFFSET + 4]).view(">u4")[:, 0]
        kinds = np.ascontiguousarray(self._slots[:count, 4:6]).view("=u2")[:, 0]
        chosen: NDArray[np.uint32] = ids[kinds == SUBSYSTEM | MSG_PACKET].astype(np.uint32)
        return chosen

    def take_payloads(self) -> Iterator[tuple[int, bytes]]:
        """(id, bytes from the IP header on) of what waits, at most a batch."""
        for index in range(self._receive()):
            message = self._slots[index, : self._messages[index].length].tobytes()
            if HEADER.unpack_from(message)[1] != SUBSYSTEM | MSG_PACKET:
                continue
            found = dict(_attributes(message))
            (packet_id,) = struct.unpack_from(">I", message, ID_OFFSET)
            yield packet_id, found.get(ATTR_PAYLOAD, b"")

    def accept_up_to(self, packet_id: int) -> None:
        """Every packet with this id or a lower one goes on, in order."""
        self._verdict(MSG_VERDICT_BATCH, packet_id, b"")

    def accept(self, packet_id: int, changed: bytes = b"") -> None:
        """One packet goes on, with other bytes if there are any."""
        self._verdict(MSG_VERDICT, packet_id, _attribute(ATTR_PAYLOAD, changed) if changed else b"")

    def _receive(self) -> int:
        count = _libc.recvmmsg(
            self._socket.fileno(), self._messages, len(self._messages), socket.MSG_DONTWAIT, None
        )
        if count < 0:
            number = ctypes.get_errno()
            if number in (11, 4):  # nothing there, or a signal
                return 0
            raise OSError(number, os.strerror(number))
        return int(count)

    def _verdict(self, kind: int, packet_id: int, more: bytes) -> None:
        body = _attribute(ATTR_VERDICT, struct.pack(">II", VERDICT_ACCEPT, packet_id)) + more
        self._send(kind, body, ask=False)

    def _configure(self, kind: int, value: bytes) -> None:
        self._send(MSG_CONFIG, _attribute(kind, value), ask=True)

    def _send(self, kind: int, body: bytes, *, ask: bool) -> None:
        body = GENERIC.pack(0, 0, self.number) + body
        flags = NLM_F_REQUEST | (NLM_F_ACK if ask else 0)
        self._socket.send(HEADER.pack(HEADER.size + len(body), SUBSYSTEM | kind, flags, 0, 0) + body)
        while ask:
            answer = self._socket.recv(META_SLOT_BYTES)
            if HEADER.unpack_from(answer)[1] == NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", answer, HEADER.size)
                if number:
                    raise OSError(-number, f"netfilter queue {self.number}: {os.strerror(-number)}")
                return


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _attributes(message: bytes) -> Iterator[tuple[int, bytes]]:
    place = HEADER.size + GENERIC.size
    while place + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, place)
        if length < ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, message[place + ATTRIBUTE.size : place + length]
        place += (length + 3) & ~3
