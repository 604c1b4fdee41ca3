"""A process in the guest that owns pages at known frame numbers, with content that is known outside.

Rule 1: every page's content is its own: a page that was lost, or that came to stand elsewhere, is seen.
Rule 2: frame numbers come from the guest's kernel (/proc/PID/pagemap) while it runs, and from the content alone
        while it is frozen; content is read from outside.
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
# The content is lines of one page's length: a number, padded with zeros on its left.
DIGITS: Final = 15
FIRST_NUMBER: Final = 10 ** (DIGITS - 1)
NUMBER_AT: Final = PAGE_BYTES - 1 - DIGITS
PAGEMAP_PRESENT: Final = 63
PFN_MASK: Final = (1 << 55) - 1  # Documentation/admin-guide/mm/pagemap.rst
LOOKS_MAX: Final = 1000  # a page is found at the first look unless the kernel just moved it
SCAN_PAGES: Final = 4096


class Marker:
    """`start` it; page i of the process is at frame `pfns[i]` and holds `content(i)`.

    Args:
        pages: how many pages it owns at least, from its second on: in the first stand the allocator's own words.
        number: of the first line; markers of one guest must not share numbers.
    """

    def __init__(
        self, guest: LinuxGuest, ram: RamFile, pages: int, name: str = "marker", number: int = FIRST_NUMBER
    ) -> None:
        self.name = name
        self.pfns: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._guest = guest
        self._ram = ram
        self._pages = pages
        self._first = number
        self._fifo = f"/tmp/{name}.fifo"  # noqa: S108 - in the guest
        self._pid = 0
        self._shift = 0  # of the first page inside the lines, in bytes

    def start(self) -> None:
        """Have the pages allocated and written. Raises GuestSilentError."""
        size = (self._pages + 3) * PAGE_BYTES  # one page more than comes, so that it waits for it
        last = self._first + self._pages + 1
        source = f"(printf '%0{PAGE_BYTES - 1}d\\n' $(seq {self._first} {last}); cat {self._fifo})"
        holder = f"dd bs={size} iflag=fullblock of=/dev/null 2>/dev/null"
        self._pid = int(self._guest.sh(f"mkfifo {self._fifo}; {source} | {holder} & echo $!"))
        for _ in range(LOOKS_MAX):
            if self._look(size):
                return
        raise GuestSilentError(f"the pages of {self.name} were not written in time")

    def content(self, index: int) -> bytes:
        """What page `index` of `pfns` must hold."""
        first = index * PAGE_BYTES + self._shift
        line = first // PAGE_BYTES
        text = b"".join(b"%0*d\n" % (PAGE_BYTES - 1, self._first + line + more) for more in range(2))
        return text[first % PAGE_BYTES :][:PAGE_BYTES]

    def problems(self) -> list[int]:
        """Frame numbers whose content is not the marker's."""
        return [int(self.pfns[index]) for index in range(len(self.pfns)) if self._is_wrong(index)]

    def find_again(self) -> list[int]:
        """Look for pages that the guest's kernel has moved, in all of RAM; indices of those that are nowhere."""
        wrong = [index for index in range(len(self.pfns)) if self._is_wrong(index)]
        if not wrong:
            return []
        at = (NUMBER_AT - self._shift) % PAGE_BYTES  # where in each page its number stands
        wanted = {self.content(index)[at : at + DIGITS]: index for index in wrong}
        for first in range(0, self._ram.size // PAGE_BYTES, SCAN_PAGES):
            size = min(SCAN_PAGES * PAGE_BYTES, self._ram.size - first * PAGE_BYTES)
            pages = np.frombuffer(self._ram.read(first * PAGE_BYTES, size), np.uint8).reshape(-1, PAGE_BYTES)
            numbers = np.ascontiguousarray(pages[:, at : at + DIGITS]).view(f"S{DIGITS}")[:, 0]
            for offset in np.flatnonzero(np.isin(numbers, list(wanted))).tolist():
                index = wanted[bytes(numbers[offset])]
                if pages[offset].tobytes() == self.content(index):
                    self.pfns[index] = first + offset
        return [index for index in wrong if self._is_wrong(index)]

    def end(self) -> None:
        """End the process; its pages are free then. Raises GuestSilentError."""
        gone = f"while kill -0 {self._pid} 2>/dev/null; do usleep 1000; done"
        self._guest.sh(f"kill {self._pid}; {gone}; rm {self._fifo}")

    # --- parts ------------------------------------------------------------------------------------

    def _is_wrong(self, index: int) -> bool:
        return self._ram.read(int(self.pfns[index]) * PAGE_BYTES, PAGE_BYTES) != self.content(index)

    def _look(self, size: int) -> bool:
        start = self._mapping(size)
        if not start:
            return False
        self.pfns = self._frames(start)
        if len(self.pfns) < self._pages:
            return False
        page = self._ram.read(int(self.pfns[0]) * PAGE_BYTES, PAGE_BYTES)
        found = re.search(rb"(\d{%d})\n" % DIGITS, page)
        if found is None:
            return False
        line = int(found[1]) - self._first
        self._shift = line * PAGE_BYTES + NUMBER_AT - found.start()
        return not self.problems()

    def _mapping(self, size: int) -> int:
        maps = self._guest.sh(f"cat /proc/{self._pid}/maps")
        for start, end in re.findall(r"^(\w+)-(\w+) rw", maps, re.MULTILINE):
            if int(end, 16) - int(start, 16) >= size:
                return int(start, 16)
        return 0

    def _frames(self, start: int) -> NDArray[np.uint64]:
        data = self._guest.read_file(
            f"/proc/{self._pid}/pagemap", offset=(start // PAGE_BYTES + 1) * 8, size=self._pages * 8
        )
        entries = np.frombuffer(data, "<u8")
        frames: NDArray[np.uint64] = (entries & PFN_MASK)[entries >> PAGEMAP_PRESENT & 1 == 1]
        return frames
