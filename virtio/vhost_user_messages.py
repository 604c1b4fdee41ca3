"""vhost-user on the wire: message numbers, flags, payload layouts (the vhost-user specification).

Rule 1: a message is a header of three 32-bit numbers (request, flags, payload bytes), a payload, and
        descriptors that travel beside the header (SCM_RIGHTS). Everything is little-endian here.
Rule 2: flags: bits 0-1 are the version, always 1; bit 2 marks a reply; bit 3 asks for one. So a reply's flags
        are exactly 5, which the Linux driver insists on.
Rule 3: sizes are checked before a payload is read: at most `PAYLOAD_BYTES_MAX`, and exactly what the
        request has.
Rule 4: descriptors are plain numbers here; who closes them is said by the sessions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from virtio.errors import LocalVirtioError, VhostUserError

HEADER = struct.Struct("<III")  # request, flags, payload bytes
HEADER_BYTES = HEADER.size
assert HEADER_BYTES == 12
PAYLOAD_BYTES_MAX = 4096  # the largest we exchange is a config access of 268 bytes; QEMU's union is about 300
FDS_MAX = 8  # the specification's limit on memory regions, the message with the most descriptors

FLAG_VERSION_MASK = 0x3
FLAG_VERSION = 0x1
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8


class Request(IntEnum):
    """Front-end to back-end message numbers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25


class BackendRequest(IntEnum):
    """Back-end to front-end message numbers, on the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE_MSG = 2


# Bit 30 of the feature word: this transport has protocol features (negotiated apart from the device's).
F_PROTOCOL_FEATURES = 30
# Protocol feature bit numbers.
PROTOCOL_F_MQ = 0
PROTOCOL_F_REPLY_ACK = 3
PROTOCOL_F_BACKEND_REQ = 5
PROTOCOL_F_CONFIG = 9
PROTOCOL_FEATURES = 1 << PROTOCOL_F_REPLY_ACK | 1 << PROTOCOL_F_BACKEND_REQ | 1 << PROTOCOL_F_CONFIG

VRING_INDEX_MASK = 0xFF
NO_FD = -1  # in place of a descriptor
VRING_NO_FD = 0x100  # in SET_VRING_KICK/CALL/ERR: no descriptor comes along

U64 = struct.Struct("<Q")
VRING_STATE = struct.Struct("<II")  # index, number
VRING_ADDR = struct.Struct("<IIQQQQ")  # index, flags, descriptor table, used ring, available ring, log
MEM_TABLE_HEAD = struct.Struct("<II")  # regions, padding
MEM_REGION = struct.Struct("<QQQQ")  # guest address, size, user address, offset into the descriptor's file
CONFIG_HEAD = struct.Struct("<III")  # offset, size, flags
CONFIG_SIZE_MAX = 256  # VHOST_USER_MAX_CONFIG_SIZE
assert (VRING_ADDR.size, MEM_REGION.size, CONFIG_HEAD.size) == (40, 32, 12)


@dataclass(frozen=True, slots=True)
class Message:
    """One vhost-user message; `flags` holds the version too, `fds` are descriptor numbers that came along."""

    request: int
    flags: int = FLAG_VERSION
    payload: bytes = b""
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request."""
        return bool(self.flags & FLAG_REPLY)

    @property
    def needs_reply(self) -> bool:
        """Whether the sender waits for an acknowledgement (if REPLY_ACK was negotiated)."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def to_bytes(self) -> bytes:
        """Header and payload. Raises LocalVirtioError when the payload is too long."""
        if len(self.payload) > PAYLOAD_BYTES_MAX:
            raise LocalVirtioError(f"payload of {len(self.payload)} bytes")
        return HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload


def decode_header(header: bytes) -> tuple[int, int, int]:
    """(request, flags, payload bytes) of a header; read that many bytes next.

    Raises VhostUserError ("header", "version", "payload_size").
    """
    if len(header) != HEADER_BYTES:
        raise VhostUserError("header", f"{len(header)} bytes")
    request, flags, size = HEADER.unpack(header)
    if flags & FLAG_VERSION_MASK != FLAG_VERSION:
        raise VhostUserError("version", f"flags {flags:#x}")
    if size > PAYLOAD_BYTES_MAX:
        raise VhostUserError("payload_size", f"request {request}: {size} bytes")
    return request, flags, size


def decode(data: bytes, fds: tuple[int, ...] = ()) -> Message:
    """A whole message from its bytes. Raises VhostUserError as `decode_header`, or "payload_size"."""
    request, flags, size = decode_header(data[:HEADER_BYTES])
    if len(data) != HEADER_BYTES + size:
        raise VhostUserError("payload_size", f"request {request}: {len(data) - HEADER_BYTES} of {size} bytes")
    return Message(request, flags, data[HEADER_BYTES:], fds)


def reply_to(request: int, payload: bytes) -> Message:
    """The reply to a request: flags are exactly version | reply."""
    return Message(request, FLAG_VERSION | FLAG_REPLY, payload)


def unpack(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    """The numbers of a payload of fixed size. Raises VhostUserError ("payload_size")."""
    if len(message.payload) != layout.size:
        raise VhostUserError(
            "payload_size", f"request {message.request}: {len(message.payload)} bytes, not {layout.size}"
        )
    return layout.unpack(message.payload)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One region of SET_MEM_TABLE: where it lies in the guest, in the front-end's space, and in its file."""

    guest_address: int
    size: int
    user_address: int
    file_offset: int


def pack_mem_table(regions: tuple[MemoryRegion, ...]) -> bytes:
    """The payload of SET_MEM_TABLE; one descriptor per region travels with it."""
    parts = [MEM_TABLE_HEAD.pack(len(regions), 0)]
    parts += [MEM_REGION.pack(r.guest_address, r.size, r.user_address, r.file_offset) for r in regions]
    return b"".join(parts)


def unpack_mem_table(message: Message) -> tuple[MemoryRegion, ...]:
    """The regions of SET_MEM_TABLE. Raises VhostUserError ("payload_size", "regions")."""
    payload = message.payload
    if len(payload) < MEM_TABLE_HEAD.size:
        raise VhostUserError("payload_size", f"memory table of {len(payload)} bytes")
    count, _ = MEM_TABLE_HEAD.unpack_from(payload)
    if not 0 < count <= FDS_MAX:
        raise VhostUserError("regions", f"{count} memory regions")
    # Linux's driver always sends room for its compile-time maximum of regions: longer is allowed.
    if len(payload) < MEM_TABLE_HEAD.size + count * MEM_REGION.size:
        raise VhostUserError("payload_size", f"memory table of {len(payload)} bytes for {count} regions")
    return tuple(
        MemoryRegion(*MEM_REGION.unpack_from(payload, MEM_TABLE_HEAD.size + index * MEM_REGION.size))
        for index in range(count)
    )
