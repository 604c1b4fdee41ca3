"""What happens to the pages that a guest gives away: inflated and reported pages leave the host.

Rule 1: pages are punched before their chain goes back: afterwards the guest may use them (virtio 1.2 sections
        5.5.6.2 and 5.5.6.7).
Rule 2: what was punched is logged afterwards, like every store of the device: a harvest must see it.
Rule 3: one system call per merged run; nothing here costs anything per page.
Rule 4: a reported page keeps its storage when the guest's free pages hold a value other than 0: the device must
        not change it to another (section 5.5.6.7), and a punched page reads as 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.ballooned import BalloonedPages

if TYPE_CHECKING:
    from host.device_log import DeviceLog
    from host.guest_region import GuestRegion
    from virtio.balloon_device import BalloonDevice
    from virtio.page_ranges import PageRuns
    from virtio.split_ring import Chain


class BalloonPages:
    """Belongs to the device's thread.

    Attributes:
        inflated_pages, deflated_pages: pages that crossed those queues, distinct within each pass.
        reported_pages: free pages the guest reported.
        released_pages: of the inflated and reported ones, those whose storage was given back.
        ballooned: the pages that are in the balloon now and have no storage.
    """

    def __init__(self, device: BalloonDevice, log: DeviceLog) -> None:
        self.inflated_pages = 0
        self.deflated_pages = 0
        self.reported_pages = 0
        self.released_pages = 0
        self.ballooned = BalloonedPages()
        self._device = device
        self._log = log

    def inflate(self, region: GuestRegion, chains: list[Chain]) -> None:
        """Chains of the inflate queue."""
        pages = self._device.process_inflate(chains, region.read)
        self.inflated_pages += pages.pages
        if self._release(region, pages):
            self.ballooned.add(pages.first, pages.count)

    def deflate(self, region: GuestRegion, chains: list[Chain]) -> None:
        """Chains of the deflate queue: there is nothing to do but to let the guest have its pages."""
        pages = self._device.process_deflate(chains, region.read)
        self.deflated_pages += pages.pages
        self.ballooned.remove(pages.first, pages.count)

    def report(self, region: GuestRegion, chains: list[Chain]) -> None:
        """Chains of the reporting queue."""
        pages = self._device.process_report(chains)
        self.reported_pages += pages.pages
        if self._device.poison == 0:
            self._release(region, pages)

    def _release(self, region: GuestRegion, pages: PageRuns) -> bool:
        """Whether none of them has storage now."""
        failed = region.punch(pages)
        if failed:
            self._device.guest_errors["punch_failed"] += failed
        self._log.add_runs(pages.first, pages.count)
        self.released_pages += pages.pages - failed
        return not failed
