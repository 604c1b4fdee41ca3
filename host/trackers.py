"""Dirty trackers: which pages must be sent again (DESIGN 3.6).

Rule 1: a harvest is what the guest wrote, united with what the devices logged; neither alone is enough.
Rule 2: between `start` and `harvest` nothing is forgotten; what a harvest returned is the caller's to send.
Rule 3: the tracker is chosen once, by probing, named with its reason, and never silently degraded.
Rule 4: hashes and hints do not go together where the guest leaves: a page that was freed, hinted, and came
        back with the content it had before looks clean to a hash, and the destination never got it.
Rule 5: a page that is dirty only because the balloon took it is left out and stays logged: deflated, it is in the
        next harvest; ballooned at the end, nobody needs it. What the guest wrote itself is never left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from host.errors import TrackerUnavailable
from migration.codec import ZERO_PAGE_HASH
from migration.page_bits import PageBits

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.device_log import DeviceLog
    from host.guest_memory import HostRam
    from host.pagemap import WriteScanner
    from migration.pages import U64Array

    Ballooned = Callable[[int], PageBits]  # pages of the guest -> those in the balloon

TrackerName = Literal["uffd", "hash"]


class DirtyTracker(Protocol):
    """What both trackers do. One thread at a time. `left_out`: pages of rule 5 at the last harvest."""

    left_out: PageBits | None

    @property
    def name(self) -> TrackerName:
        """As in scenario and report."""

    def start(self) -> None:
        """Track from now on. What was written before is the first round's matter: it sends everything."""

    def harvest(self) -> PageBits:
        """Pages written since `start` or the last harvest. Raises TrackerUnavailable."""

    def stop(self) -> None:
        """Track no more and release what tracking needed. Idempotent."""


class UffdTracker:
    """The kernel's: exact, costs the guest about 1 microsecond per page and round.

    The scanner stays the caller's: it outlives one migration attempt.
    """

    name: TrackerName = "uffd"

    def __init__(
        self, scanner: WriteScanner, device_log: DeviceLog, ballooned: Ballooned | None = None
    ) -> None:
        self.left_out: PageBits | None = None
        self._scanner = scanner
        self._device_log = device_log
        self._ballooned = ballooned

    def start(self) -> None:
        """Protect all of RAM."""
        # The log first: a store that is logged while the scan runs stays for the first harvest.
        self._device_log.take()
        self._scanner.scan_and_protect()

    def harvest(self) -> PageBits:
        """Pages the guest wrote through its mapping, and the devices' own stores."""
        written = self._scanner.scan_and_protect()
        dirty, self.left_out = _with_device_stores(
            written, self._device_log, self._ballooned, lambda: ~written
        )
        return dirty

    def stop(self) -> None:
        """Nothing to release: pages stay protected; the next write to each costs the guest a last fault."""


class HashTracker:
    """The portable one: a page is dirty when it no longer hashes to what was sent.

    `sent_hashes` (one u64 per page, shared with the sender, who writes the hash of the bytes it sent; 0 means
    never sent) is only read here. Costs a pass over all of RAM per harvest, works with any guest and kernel.
    """

    name: TrackerName = "hash"

    def __init__(
        self,
        ram: HostRam,
        sent_hashes: U64Array,
        device_log: DeviceLog,
        ballooned: Ballooned | None = None,
    ) -> None:
        if len(sent_hashes) != ram.pages:
            raise ValueError(f"{len(sent_hashes)} hashes for {ram.pages} pages")
        self.left_out: PageBits | None = None
        self._ram = ram
        self._sent_hashes = sent_hashes
        self._device_log = device_log
        self._ballooned = ballooned
        self._baseline: U64Array | None = None

    def start(self) -> None:
        """Hash all of RAM: the state against which never-sent pages are compared."""
        self._device_log.take()
        self._baseline = self._ram.hash_pages()

    def harvest(self) -> PageBits:
        """Pages that differ from what was sent (never sent: from the start), and the devices' stores."""
        assert self._baseline is not None, "harvest before start"
        known = np.where(self._sent_hashes != 0, self._sent_hashes, self._baseline)
        found = self._ram.hash_pages()
        dirty, self.left_out = _with_device_stores(
            PageBits.of(found != known),
            self._device_log,
            self._ballooned,
            lambda: PageBits.of(found == ZERO_PAGE_HASH),
        )
        return dirty

    def stop(self) -> None:
        """Forget the baseline."""
        self._baseline = None


def choose(
    requested: str, write_protect_reason: str, *, hints: bool, rehearsal: bool = False
) -> tuple[TrackerName, str]:
    """The tracker to use and why, as (name, reason).

    Args:
        requested: "auto", "uffd" or "hash", as the scenario says.
        write_protect_reason: why the kernel's tracking is not available; "" when it is.
        hints: whether free pages will be skipped because the guest hinted them.
        rehearsal: whether the guest goes on here: then rule 4 costs no write, at worst a comparison that fails.

    Raises:
        TrackerUnavailable: what was asked for cannot be had, in one line.
        ValueError: no such tracker.
    """
    match requested:
        case "uffd" if not write_protect_reason:
            return "uffd", "asked for"
        case "uffd":
            raise TrackerUnavailable(f"tracker uffd is not available: {write_protect_reason}")
        case "hash" if hints and not rehearsal:
            raise TrackerUnavailable(
                "tracker hash cannot be combined with hints: a page that was freed and came back"
                " with the same content looks clean"
            )
        case "hash":
            return "hash", "asked for"
        case "auto" if not write_protect_reason:
            return "uffd", "the kernel tracks the guest's writes"
        case "auto" if hints and not rehearsal:
            raise TrackerUnavailable(
                f"hints need tracker uffd, which is not available: {write_protect_reason}"
            )
        case "auto":
            return "hash", f"tracker uffd is not available: {write_protect_reason}"
        case _:
            raise ValueError(f"no tracker {requested!r}: choose auto, uffd or hash")


def _with_device_stores(
    dirty: PageBits,
    device_log: DeviceLog,
    ballooned: Ballooned | None,
    unwritten: Callable[[], PageBits],
) -> tuple[PageBits, PageBits | None]:
    """`dirty` with what the devices stored, without ballooned pages that the guest left alone; and these.

    `unwritten` says which pages the guest did not write since the balloon may have taken them.
    """
    # Taken after the guest's harvest: whatever the devices stored until now is in this one.
    first, count = device_log.take_runs(dirty.pages)
    if not first.size:
        return dirty, None
    logged = PageBits.of_runs(first, count, dirty.pages)
    held = ballooned(dirty.pages) if ballooned is not None else None
    if held is None or not held.any():
        return dirty | logged, None
    left_out = logged & held & unwritten()
    if not left_out.any():
        return dirty | logged, None
    first, pages = left_out.runs()
    device_log.add_runs(first, pages.astype(np.uint64))
    return (dirty | logged).minus(left_out), left_out
