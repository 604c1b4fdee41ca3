"""Memory pressure: whom an allocation that fell short asks, in which order, and how often that happened.

Rule 1: hooks run in order of their priority, in the allocating thread, without the allocator's lock.
Rule 2: an allocation made by a hook asks no hooks itself.
Rule 3: what happened is counted; the balloon's statistics tell the host.
"""

import threading
from collections.abc import Callable
from typing import Final

# The order in which an allocation that fell short asks for memory back (FACTS section 2, hazard 11).
PRESSURE_HELD: Final = 0
PRESSURE_CACHE: Final = 10
PRESSURE_BALLOON: Final = 20

PressureHook = Callable[[int], int]


class _Relieving(threading.local):
    active = False


class Pressure:
    """The hooks of one allocator.

    Attributes:
        stalls: allocations that had to ask. released_pages: what the hooks gave back, in all.
        failures: allocations for which even that was not enough.
    """

    def __init__(self) -> None:
        self.stalls = 0
        self.released_pages = 0
        self.failures = 0
        self._hooks: list[tuple[int, PressureHook]] = []
        self._relieving = _Relieving()

    def add(self, priority: int, hook: PressureHook) -> None:
        """Let hook(pages_wanted) -> pages_released be asked, low priority first."""
        self._hooks = sorted([*self._hooks, (priority, hook)], key=lambda entry: entry[0])

    def remove(self, hook: PressureHook) -> None:
        """Forget a hook."""
        self._hooks = [entry for entry in self._hooks if entry[1] != hook]

    def relieve(self, pages_wanted: int, *, first: int = PRESSURE_HELD, last: int = PRESSURE_BALLOON) -> bool:
        """Ask the hooks; whether they released anything, so that trying again makes sense.

        Only those of priorities first..last: a balloon makes the page cache shrink, and never itself.
        """
        if self._relieving.active:
            return False
        self._relieving.active = True
        self.stalls += 1
        released = 0
        try:
            for priority, hook in self._hooks:
                if first <= priority <= last and released < pages_wanted:
                    released += hook(pages_wanted - released)
        finally:
            self._relieving.active = False
        self.released_pages += released
        self.failures += released == 0
        return released > 0
