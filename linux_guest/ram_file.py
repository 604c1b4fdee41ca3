"""The file that is a Linux guest's RAM, as its holder reads it.

Rule 1: offset == guest physical address. What lies below the guest's first byte is a hole, as the kernel's image
        is in no file.
Rule 2: it is read by pread, never through a mapping: looking at a hole must not fill it.
"""

from __future__ import annotations

import os


class RamFile:
    """Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, address: int, size: int) -> bytes:
        """A copy of guest memory. Raises ValueError outside it."""
        if address < 0 or size < 0 or address + size > self.size:
            raise ValueError(f"{address:#x}+{size:#x} is outside guest RAM of {self.size:#x} bytes")
        parts, done = [], 0
        while done < size:
            part = os.pread(self.fd, size - done, address + done)
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def resident_bytes(self) -> int:
        """What the file occupies on the host."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
