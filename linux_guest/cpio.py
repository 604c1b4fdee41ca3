"""Writes cpio archives of the "newc" kind, the one that Linux unpacks as its first file system.

Rule 1: the format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst): every entry is
        a header of fourteen numbers as eight hexadecimal digits each, the name, the content, each padded to four.
Rule 2: the same entries give the same bytes: times are zero, inode numbers count up.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC: Final = b"070701"
END: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file; `mode` has the type bits of stat(2)."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, content: bytes) -> Entry:
    """An executable file."""
    return Entry(name, stat.S_IFREG | 0o755, content)


def link(name: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int) -> Entry:
    """A device node."""
    return Entry(name, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive, with its trailer."""
    parts = [_record(entry, inode) for inode, entry in enumerate(entries, 1)]
    return b"".join([*parts, _record(Entry(END, 0), 0)])


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
    head = MAGIC + b"".join(b"%08X" % number for number in numbers)
    return _padded(head + name) + _padded(entry.content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
