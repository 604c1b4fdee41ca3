"""A process in the guest that owns pages at known frame numbers, with content that is known outside.

Rule 1: every page's content is its own: a page that was lost, or that came to stand elsewhere, is seen.
Rule 2: frame numbers come from the guest kernel (/proc/PID/pagemap), content is read from outside.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from linux_guest.errors import GuestSilentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from linux_guest.ram_file import RamFile
    from linux_guest.uml import LinuxGuest

PAGE_BYTES: Final = 4096
DIGITS: Final = 15  # of a number in the content, with its line break 16 bytes
FIRST_NUMBER: Final = 10 ** (DIGITS - 1)
PAGEMAP_PRESENT: Final = 63
PFN_MASK: Final = (1 << 55) - 1  # Documentation/admin-guide/mm/pagemap.rst
LOOKS_MAX: Final = 300


class Marker:
    """Started by `start`; its pages are in `pfns`, page i holding `content(i)`."""

    def __init__(self, guest: LinuxGuest, ram: RamFile, pages: int, name: str = "marker") -> None:
        self._guest = guest
        self._ram = ram
        self._pages = pages
        self._fifo = f"/tmp/{name}.fifo"  # noqa: S108 - in the guest
        self._pid = 0
        self._shift = 0  # of the content inside the mapping, in bytes
        self.pfns: NDArray[np.uint64] = np.empty(0, np.uint64)

    def start(self) -> None:
        """Have the pages allocated and written. Raises GuestSilentError."""
        lines = (self._pages + 1) * PAGE_BYTES // (DIGITS + 1)
        last = FIRST_NUMBER + lines - 1
        size = 2 * lines * (DIGITS + 1)  # never full, so that it waits for more
        command = f"dd bs={size} iflag=fullblock of=/dev/null 2>/dev/null"
        self._guest.sh(f"mkfifo {self._fifo}")
        source = f"(seq {FIRST_NUMBER} {last}; cat {self._fifo})"
        self._pid = int(self._guest.sh(f"{source} | {command} & echo $!"))
        for _ in range(LOOKS_MAX):
            if self._look(size):
                return
        raise GuestSilentError("the marker's pages were not written in time")

    def content(self, index: int) -> bytes:
        """What page `index` of `pfns` must hold."""
        first = index * PAGE_BYTES + self._shift
        numbers = range(first // (DIGITS + 1), (first + PAGE_BYTES) // (DIGITS + 1) + 1)
        text = "".join(f"{FIRST_NUMBER + number}\n" for number in numbers).encode()
        skip = first % (DIGITS + 1)
        return text[skip : skip + PAGE_BYTES]

    def problems(self) -> list[int]:
        """Frame numbers whose content is not the marker's."""
        return [
            pfn
            for index, pfn in enumerate(self.pfns.tolist())
            if self._ram.read(pfn * PAGE_BYTES, PAGE_BYTES) != self.content(index)
        ]

    def frames_now(self) -> NDArray[np.uint64]:
        """Where its pages are now, as the guest's kernel says."""
        start, _ = self._mapping(self._pages * PAGE_BYTES)
        return self._frames(start)

    def end(self) -> None:
        """End the process; its pages are free then. Raises GuestSilentError."""
        self._guest.sh(
            f"kill {self._pid}; while kill -0 {self._pid} 2>/dev/null; do usleep 1000; done; rm {self._fifo}"
        )

    # --- parts ------------------------------------------------------------------------------------

    def _look(self, size: int) -> bool:
        start, end = self._mapping(size)
        if end - start < size:
            return False
        self.pfns = self._frames(start)
        if len(self.pfns) < self._pages:
            return False
        page = self._ram.read(int(self.pfns[0]) * PAGE_BYTES, PAGE_BYTES)
        found = re.search(rb"(\d{%d})\n" % DIGITS, page)
        if found is None:
            return False
        self._shift = (int(found[1]) - FIRST_NUMBER) * (DIGITS + 1) - found.start()
        return not self.problems()

    def _mapping(self, size: int) -> tuple[int, int]:
        maps = self._guest.sh(f"cat /proc/{self._pid}/maps")
        places = [
            (int(start, 16), int(end, 16))
            for start, end in re.findall(r"^(\w+)-(\w+) rw", maps, re.MULTILINE)
        ]
        return next(((start, end) for start, end in places if end - start >= size), (0, 0))

    def _frames(self, start: int) -> NDArray[np.uint64]:
        """Frames of whole pages of content: not the first page, in which the allocator's own words stand."""
        entries = np.frombuffer(
            self._guest.read_file(
                f"/proc/{self._pid}/pagemap", offset=(start // PAGE_BYTES + 1) * 8, size=self._pages * 8
            ),
            "<u8",
        )
        frames: NDArray[np.uint64] = (entries & PFN_MASK)[entries >> PAGEMAP_PRESENT & 1 == 1]
        return frames
