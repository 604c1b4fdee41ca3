"""Numbers of the balloon device and its configuration space (virtio 1.2 section 5.5).

Rule 1: numbers here are the standard's; those that are not (`F_SG`, `F_HINT_WAIT_ON_ACK`, `CMD_ID_FIRST`) say
        so.
Rule 2: a running command id is never below 2, and ids wrap from 2**32 - 1 to `CMD_ID_FIRST`.
Rule 3: the configuration space is 16 little-endian bytes; every access states an offset and stays inside.

`F_SG` and the merged numbers: version 17 of the series used bit 3 for F_SG (ballooned pages as
scatter-gather entries) and bit 4 for FREE_PAGE_VQ. What merged, and is the standard now, has FREE_PAGE_HINT
at 3, PAGE_POISON at 4 and REPORTING at 5; F_SG never merged. It gets device bit 23 here, which the standard
leaves unassigned.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from virtio.errors import GuestProtocolError

PAGE_BYTES = 4096
PAGE_SHIFT = 12

# Feature bit numbers, section 5.5.3.
F_MUST_TELL_HOST = 0
F_STATS_VQ = 1
F_DEFLATE_ON_OOM = 2
F_FREE_PAGE_HINT = 3
F_PAGE_POISON = 4
F_REPORTING = 5
F_HINT_WAIT_ON_ACK = 6  # a kernel RFC of 2026: a hinted block is used again only after its buffer was
F_SG = 23
# Feature bit numbers of every device, section 6.
F_RING_INDIRECT_DESC = 28
F_RING_EVENT_IDX = 29
F_VERSION_1 = 32

# Queue numbers, section 5.5.2: fixed, whether or not a feature is on. (Linux packs them: queue_numbers.py.)
QUEUE_INFLATE = 0
QUEUE_DEFLATE = 1
QUEUE_STATS = 2
QUEUE_HINT = 3
QUEUE_REPORTING = 4
QUEUE_COUNT = 5

# Command ids of free page hinting, section 5.5.6.5.
CMD_ID_STOP = 0
CMD_ID_DONE = 1
CMD_ID_FIRST = 0x8000_0000  # QEMU's convention; the standard only says that ids below 2 are taken
CMD_ID_LAST = 0xFFFF_FFFF
CMD_ID_BYTES = 4

PFN_ARRAY_MAX = 256  # one inflate or deflate buffer of Linux's driver: 256 page frame numbers, 1 KiB

CONFIG = struct.Struct("<IIII")  # num_pages, actual, free_page_hint_cmd_id, poison_val: section 5.5.4
CONFIG_BYTES = CONFIG.size
CONFIG_OFFSET_NUM_PAGES = 0
CONFIG_OFFSET_ACTUAL = 4
CONFIG_OFFSET_CMD_ID = 8
CONFIG_OFFSET_POISON = 12
assert CONFIG_BYTES == 16
U32_MAX = 0xFFFF_FFFF


def mask(*bits: int) -> int:
    """The feature word with exactly these bit numbers set."""
    word = 0
    for bit in bits:
        word |= 1 << bit
    return word


def has(features: int, bit: int) -> bool:
    """Whether the bit number is set in the feature word."""
    return bool(features >> bit & 1)


def command_id_after(command_id: int) -> int:
    """The id to issue after this one: counts up and wraps, never below `CMD_ID_FIRST`."""
    return command_id + 1 if CMD_ID_FIRST <= command_id < CMD_ID_LAST else CMD_ID_FIRST


@dataclass(slots=True)
class BalloonConfig:
    """The configuration space of a balloon (section 5.5.4): four 32-bit numbers.

    Attributes:
        num_pages: pages the host wants ballooned, in units of 4 KiB.
        actual: pages the driver says are ballooned.
        free_page_hint_cmd_id: the current command id, or CMD_ID_STOP, or CMD_ID_DONE.
        poison_val: the value the guest fills freed pages with.
    """

    num_pages: int = 0
    actual: int = 0
    free_page_hint_cmd_id: int = CMD_ID_STOP
    poison_val: int = 0

    def to_bytes(self) -> bytes:
        """The 16 bytes as the guest reads them."""
        return CONFIG.pack(self.num_pages, self.actual, self.free_page_hint_cmd_id, self.poison_val)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> BalloonConfig:
        """A configuration read from a device. Raises GuestProtocolError ("config_size") unless 16 bytes."""
        if len(data) != CONFIG_BYTES:
            raise GuestProtocolError("config_size", f"{len(data)} bytes, not {CONFIG_BYTES}")
        return cls(*CONFIG.unpack(data))

    def read(self, offset: int, size: int) -> bytes:
        """A part of the space. Raises GuestProtocolError ("config_range") when it leaves the space."""
        _check_range(offset, size)
        return self.to_bytes()[offset : offset + size]

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite a part of the space. Raises GuestProtocolError ("config_range") outside it."""
        _check_range(offset, len(data))
        space = bytearray(self.to_bytes())
        space[offset : offset + len(data)] = data
        self.num_pages, self.actual, self.free_page_hint_cmd_id, self.poison_val = CONFIG.unpack(space)


def _check_range(offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > CONFIG_BYTES:
        raise GuestProtocolError("config_range", f"offset {offset} size {size}")
