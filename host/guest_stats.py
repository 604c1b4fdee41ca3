"""The statistics buffer of a guest: held by the device, given back to ask for fresh numbers (section 5.5.6.3).

Rule 1: one buffer is held. Giving it back is the request; the guest fills it and sends it again.
Rule 2: a guest that sends a second one gets the first back: it wanted to talk, and nobody's memory grows.
Rule 3: when the ring stops, the held buffer goes back to where it was taken from (`DeviceRing.unpop`): whoever
        serves the ring next finds it. If something bad came after it, it is given back used instead.
Rule 4: whoever asked is answered, whatever happens: by numbers, or by DeviceNotReady when the ring stops.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING

from host.clock import now_ns
from host.errors import DeviceNotReady
from virtio.balloon_stats import GuestStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio.balloon_device import BalloonDevice
    from virtio.split_ring import Chain, DeviceRing

WAITERS_MAX = 256  # callers that wait at once; more is a loop somewhere


class GuestStats:
    """Belongs to the device's thread; the futures are anybody's.

    Attributes:
        latest: the last statistics that came.
        at_ns: when they came (CLOCK_MONOTONIC), 0 for never.
        reports: how many came.
    """

    def __init__(self, device: BalloonDevice) -> None:
        self.latest = GuestStatistics()
        self.at_ns = 0
        self.reports = 0
        self._device = device
        self._held: tuple[DeviceRing, int] | None = None
        self._waiting: list[Future[GuestStatistics]] = []

    def take(self, ring: DeviceRing, chains: list[Chain], read: Callable[[int, int], bytes]) -> list[int]:
        """Chains came on `ring`; returns the heads to give back now."""
        back: list[int] = []
        news = False
        for chain in chains:
            statistics = self._device.process_stats(chain, read)
            if statistics is None:
                back.append(chain.head)
                continue
            if self._held is not None:
                self._device.guest_errors["stats_buffers"] += 1
                back.append(self._held[1])
            self._held = (ring, chain.head)
            self.latest, self.at_ns, news = statistics, now_ns(), True
            self.reports += 1
        if news:
            for future in self._taken():
                future.set_result(self.latest)
        return back

    def ask(self) -> Future[GuestStatistics]:
        """Give the buffer back (publish afterwards) unless that was done before; the answer comes in the future.

        Raises:
            DeviceNotReady: too many wait already.
        """
        if len(self._waiting) >= WAITERS_MAX:
            raise DeviceNotReady(f"{WAITERS_MAX} callers wait for the guest's statistics already")
        if self._held is not None:
            (ring, head), self._held = self._held, None
            ring.push(head)
        future: Future[GuestStatistics] = Future()
        self._waiting.append(future)
        return future

    def forget(self, future: Future[GuestStatistics]) -> None:
        """Nobody waits for this answer any more."""
        if future in self._waiting:
            self._waiting.remove(future)

    def let_go(self, ring: DeviceRing) -> None:
        """`ring` stops, or is of another queue now: no buffer of it is held, and who waits is told."""
        if self._held is None or self._held[0] is not ring:
            return
        (_, head), self._held = self._held, None
        if ring.newest == head:
            ring.unpop(head)
        elif ring.broken is None:
            ring.push(head)

    def ended(self) -> None:
        """The queue stopped: nobody will answer those who wait."""
        for future in self._taken():
            future.set_exception(DeviceNotReady("the guest's statistics queue was stopped"))

    def _taken(self) -> list[Future[GuestStatistics]]:
        waiting, self._waiting = self._waiting, []
        return waiting
