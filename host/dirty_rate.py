"""How fast a running guest dirties its memory, from its dirty log.

Rule 1: a sample is what one period found dirty; the curve is how many distinct pages the first k periods found.
Rule 2: periods lie end to end: a write between two looks is in one of them, and a period's length is measured.
Rule 3: what is found here is forgotten by the log. So nothing else may be tracking meanwhile; a migration that
        begins afterwards starts its own tracking and sends everything in round 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from host.clock import now_ns
from host.trackers import UffdTracker
from migration.page_bits import PageBits

if TYPE_CHECKING:
    from host.device_log import DeviceLog
    from host.guest_memory import HostRam
    from host.pagemap import WriteScanner

PERIOD_MS_MAX = 60_000  # a rate over a longer time says nothing about a migration
PERIODS_MAX = 1000  # each is kept, and listed in the answer
TOTAL_MS_MAX = 120_000  # a call that takes longer would be taken for a dead host


class Looks(Protocol):
    """A way to see what was dirtied since the last look."""

    def start(self) -> None:
        """Look from now on."""

    def harvest(self) -> PageBits:
        """Pages dirtied since `start` or the last harvest."""


class HashLooks:
    """By hashing all of RAM at every look: for guests and kernels that cannot do better."""

    def __init__(self, ram: HostRam) -> None:
        self._ram = ram
        self._hashes = np.empty(0, np.uint64)

    def start(self) -> None:
        """See Looks."""
        self._hashes = self._ram.hash_pages()

    def harvest(self) -> PageBits:
        """See Looks. A page written with what it held is not seen."""
        before, self._hashes = self._hashes, self._ram.hash_pages()
        return PageBits.of(self._hashes != before)


class Waits(Protocol):
    """What `threading.Event` offers: whoever sets it ends the measurement."""

    def wait(self, timeout: float) -> bool:
        """Wait; True when it was set."""


@dataclass(frozen=True, slots=True)
class DirtySamples:
    """What was found.

    Attributes:
        dirtied_pages, period_ms: of each period. cumulative_pages: distinct pages in the first k periods.
        tracker: "uffd" or "hash".
    """

    dirtied_pages: tuple[int, ...]
    period_ms: tuple[float, ...]
    cumulative_pages: tuple[int, ...]
    tracker: str


def check_periods(period_ms: int, periods: int) -> None:
    """Raises ValueError when this cannot be measured within one call."""
    if not 1 <= period_ms <= PERIOD_MS_MAX:
        raise ValueError(f"a period of {period_ms} ms is outside 1 .. {PERIOD_MS_MAX} ms")
    if not 1 <= periods <= PERIODS_MAX or period_ms * periods > TOTAL_MS_MAX:
        raise ValueError(
            f"{periods} periods of {period_ms} ms: at most {PERIODS_MAX}, and {TOTAL_MS_MAX} ms in all"
        )


def measure(looks: Looks, tracker: str, period_ms: int, periods: int, stopping: Waits) -> DirtySamples:
    """Looks `periods` times, `period_ms` apart. A measurement that is stopped ends with fewer samples."""
    dirtied: list[int] = []
    took_ms: list[float] = []
    cumulative: list[int] = []
    seen: PageBits | None = None
    looks.start()
    started_ns = now_ns()
    for _ in range(periods):
        if stopping.wait(period_ms / 1e3):
            break
        dirty = looks.harvest()
        ended_ns = now_ns()
        took_ms.append((ended_ns - started_ns) / 1e6)
        started_ns = ended_ns
        dirtied.append(dirty.count)
        seen = dirty if seen is None else seen | dirty
        cumulative.append(seen.count)
    return DirtySamples(tuple(dirtied), tuple(took_ms), tuple(cumulative), tracker)


def looks_at(ram: HostRam, scanner: WriteScanner | None, log: DeviceLog) -> tuple[Looks, str]:
    """The best way to look here, and its name: the kernel's tracking where the guest has it."""
    if scanner is not None:
        return UffdTracker(scanner, log), UffdTracker.name
    return HashLooks(ram), "hash"
