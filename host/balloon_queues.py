"""The balloon device's hands: guest RAM as the front-end shared it, and the running rings.

Rule 1: chains go back to the guest in the pass that took them, except the one statistics buffer.
Rule 2: what chains ask for is done before they go back: afterwards the guest may use the pages (section 5.5.6).
        Hints too are handed on first, which is what F_HINT_WAIT_ON_ACK promises.
Rule 3: every store of the device is logged after it was made: used rings and punched pages.
Rule 4: a pass is at most one ring full of chains and `PASS_READ_BYTES_MAX` of what they hold; whoever calls decides
        whether there is another.
Rule 5: the guest's mistakes are counted in `BalloonDevice.guest_errors` and cost it the chain, or the ring.
Rule 6: rings have numbers, queues have meanings; `virtio/queue_numbers.py` says which is which, and a ring without
        a meaning gets its chains back, counted.
"""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from host.balloon_pages import BalloonPages
from host.errors import DeviceNotReady
from host.guest_region import GuestRegion
from host.guest_stats import GuestStats
from host.hint_batch import HintBatch, batch_of
from virtio.balloon import (
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    PAGE_BYTES,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    has,
)
from virtio.errors import VhostUserError
from virtio.queue_numbers import QueueNumbers
from virtio.split_ring import DeviceRing

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from host.device_log import DeviceLog
    from virtio.balloon_device import BalloonDevice
    from virtio.balloon_stats import GuestStatistics
    from virtio.hint_session import HintEvent
    from virtio.split_ring import Chain
    from virtio.vhost_user import RingFdsChanged, StartRing

__all__ = ["BalloonQueues", "HintBatch"]

ONE = (1).to_bytes(8, "little")  # what an eventfd counts up by
# 64 Ki page frame numbers: scattered, they are as many system calls, about 0.2 s; then others have their turn.
PASS_READ_BYTES_MAX = 4 * (64 << 10)


@dataclass(slots=True)
class _Served:
    """A running ring and its descriptors, which are the vhost-user session's."""

    ring: DeviceRing
    kick_fd: int
    call_fd: int
    err_fd: int
    errors_seen: int = 0  # of `ring.errors_count`, those that are in the device's counters


class BalloonQueues:
    """One thread only. `device` outlives the front-end's connections; memory and rings do not."""

    def __init__(self, device: BalloonDevice, log: DeviceLog, sink: Callable[[HintBatch], None]) -> None:
        self.device = device
        self.pages = BalloonPages(device, log)
        self.stats = GuestStats(device)
        self.numbers = QueueNumbers()
        self.bases = [0] * QUEUE_COUNT  # next_avail of every ring when it was last stopped
        self.command_id = 0  # the one issued last
        self.quiet = threading.Event()  # no ring is served; other threads may wait for it
        self.quiet.set()
        self._log = log
        self._sink = sink
        self._region: GuestRegion | None = None
        self._served: dict[int, _Served] = {}

    # --- set-up -----------------------------------------------------------------------------------

    @property
    def mapped(self) -> bool:
        """Whether guest RAM is shared with us."""
        return self._region is not None

    @property
    def sealed(self) -> bool:
        """Whether guest RAM is shared and its file can shrink no more."""
        return self._region is not None and self._region.sealed

    @property
    def running(self) -> frozenset[int]:
        """The queues that are served."""
        queues = (self.numbers.queue_of(index) for index in self._served)
        return frozenset(queue for queue in queues if queue is not None)

    def serves(self, index: int) -> bool:
        """Whether ring number `index` runs."""
        return index in self._served

    def ring_bases(self) -> tuple[int, ...]:
        """The next avail index of every ring, running or stopped."""
        bases = list(self.bases)
        for index, served in self._served.items():
            bases[index] = served.ring.next_avail
        return tuple(bases)

    def driver_chose(self, features: int) -> None:
        """Features were set. Another choice is another driver, whose rings may be numbered otherwise."""
        if features != self.device.features:
            for served in self._served.values():
                self.stats.let_go(served.ring)
            self.stats.ended()
            self.numbers = QueueNumbers(features)
        self.device.negotiate(features)

    def map_region(self, fd: int, guest_address: int, size: int) -> None:
        """Map guest RAM instead of what was mapped; takes `fd` over. No ring may be running.

        Raises VhostUserError ("region") for a file that is too short or cannot be mapped.
        """
        assert not self._served, "memory changed under running rings"
        self.unmap()
        self.numbers = QueueNumbers(self.device.features)
        region = GuestRegion(fd, guest_address, size)
        self._region = region
        self.device.first_page, self.device.pages = region.first_page, region.end_page

    def unmap(self) -> None:
        """Let go of guest RAM. Idempotent."""
        region, self._region = self._region, None
        if region is not None:
            region.close()

    def start(self, order: StartRing) -> None:
        """Serve a ring. Raises GuestProtocolError ("ring_layout"), or VhostUserError when it cannot be."""
        _check_fds(order)
        region = self._whole_region()
        features = self.device.features
        ring = DeviceRing(
            region.memory,
            order.layout,
            next_avail=order.base,
            event_idx=has(features, F_RING_EVENT_IDX),
            indirect=has(features, F_RING_INDIRECT_DESC),
            first_address=region.first_page * PAGE_BYTES,
        )
        self.quiet.clear()
        self.numbers.set_up(order.index)
        self._served[order.index] = _Served(ring, order.kick_fd, order.call_fd, order.err_fd)

    def change_fds(self, order: RingFdsChanged) -> None:
        """A running ring has other descriptors now. Raises VhostUserError when it loses its kick."""
        _check_fds(order)
        served = self._served[order.index]
        served.kick_fd, served.call_fd, served.err_fd = order.kick_fd, order.call_fd, order.err_fd

    def kick_fd(self, index: int) -> int:
        """The descriptor that tells of new chains."""
        return self._served[index].kick_fd

    def stop(self, index: int) -> int:
        """Touch a ring no more; returns its next avail index. Every store into it is logged by now."""
        served = self._served.get(index)
        if served is not None:
            if self._region is not None and self._region.still_whole():
                self.stats.let_go(served.ring)
                self._hand_back(served)
            if self.numbers.queue_of(index) == QUEUE_STATS:
                self.stats.ended()
            del self._served[index]
            self.bases[index] = served.ring.next_avail
            self._log.add_stores(served.ring.take_stores())
            served.ring.close()
        if not self._served:
            self.quiet.set()
        return self.bases[index]

    # --- work -------------------------------------------------------------------------------------

    def serve(self, index: int) -> bool:
        """One pass over a ring; whether it found anything. The ring may have been stopped meanwhile.

        Raises VhostUserError ("region_shrunk") when there is less guest RAM than the front-end said.
        """
        served = self._served.get(index)
        if served is None:
            return False
        return self._exchange(served, self._handler_of(served, self.numbers.queue_of(index))) > 0

    def serve_out(self) -> None:
        """Serve every ring until it is empty. Its guest stands still, so that it holds no more than its size."""
        for index, served in list(self._served.items()):
            for _ in range(served.ring.size):
                if not self.serve(index):
                    break

    def drain_hints(self) -> HintBatch:
        """What the hint queue holds now, as one batch that the sink does not see. Raises as `serve`.

        A ring holds so many chains and no more: what a guest adds while we take these came after the close.
        """
        events: list[HintEvent] = []
        served = self._served_queue(QUEUE_HINT)
        if served is not None:
            left = served.ring.size
            while left > 0:
                taken = self._exchange(served, lambda chains: self._collect(chains, events), left)
                if taken == 0:
                    break
                left -= taken
        return batch_of(self.command_id, events)

    def ask_stats(self) -> Future[GuestStatistics]:
        """Ask the guest for fresh statistics. Raises as `serve`, and DeviceNotReady without that queue."""
        served = self._served_queue(QUEUE_STATS)
        if served is None or served.ring.broken is not None:
            raise DeviceNotReady("no guest driver with a statistics queue is up")
        self._whole_region()
        future = self.stats.ask()
        self._hand_back(served)
        return future

    def broken(self, index: int) -> bool:
        """Whether the guest ruined this ring: it is served no more until it is set up again."""
        served = self._served.get(index)
        return served is not None and served.ring.broken is not None

    def _served_queue(self, queue: int) -> _Served | None:
        for index, served in self._served.items():
            if self.numbers.queue_of(index) == queue:
                return served
        return None

    def _whole_region(self) -> GuestRegion:
        region = self._region
        if region is None:
            raise VhostUserError("ring_memory", "a ring without memory")
        if not region.sealed and not region.still_whole():
            raise VhostUserError("region_shrunk", "the file of guest RAM is shorter than the front-end said")
        return region

    def _exchange(
        self, served: _Served, handle: Callable[[list[Chain]], list[int]], chains_max: int | None = None
    ) -> int:
        """Take chains, handle them, give back those that `handle` says, interrupt.

        Returns how many were taken, good or bad; 0 from a broken ring, which has no more.
        """
        self._whole_region()
        ring = served.ring
        before = ring.next_avail
        chains = ring.pop_all(chains_max, readable_bytes_max=PASS_READ_BYTES_MAX)
        taken = (ring.next_avail - before) & 0xFFFF
        if chains:
            ring.push_many(handle(chains))
        self._hand_back(served)
        return 0 if ring.broken is not None else taken

    def _hand_back(self, served: _Served) -> None:
        """Publish what was pushed, log the stores, count what was wrong, interrupt."""
        ring = served.ring
        interrupt = ring.publish()
        self._log.add_stores(ring.take_stores())
        errors = ring.take_errors()
        self.device.count_errors(errors)
        unlisted = ring.errors_count - served.errors_seen - len(errors)
        if unlisted:
            self.device.guest_errors["chains_unlisted"] += unlisted
        served.errors_seen = ring.errors_count
        if interrupt:
            self._signal(served.call_fd)
        if ring.broken is not None and errors:
            self._signal(served.err_fd)

    def _handler_of(self, served: _Served, queue: int | None) -> Callable[[list[Chain]], list[int]]:
        region = self._whole_region()
        if queue == QUEUE_STATS:
            return lambda chains: self.stats.take(served.ring, chains, region.read)
        if queue == QUEUE_HINT:
            return self._take_hints
        if queue is None:
            return self._refuse
        work = {
            QUEUE_INFLATE: self.pages.inflate,
            QUEUE_DEFLATE: self.pages.deflate,
            QUEUE_REPORTING: self.pages.report,
        }[queue]

        def handle(chains: list[Chain]) -> list[int]:
            work(region, chains)
            return _heads(chains)

        return handle

    def _refuse(self, chains: list[Chain]) -> list[int]:
        self.device.guest_errors["queue_not_negotiated"] += len(chains)
        return _heads(chains)

    def _take_hints(self, chains: list[Chain]) -> list[int]:
        events: list[HintEvent] = []
        heads = self._collect(chains, events)
        if events:
            self._sink(batch_of(self.command_id, events))
        return heads

    def _collect(self, chains: list[Chain], events: list[HintEvent]) -> list[int]:
        read = self._whole_region().read
        for chain in chains:
            events += self.device.process_hint(chain, read)
        return _heads(chains)

    def _signal(self, fd: int) -> None:
        if fd < 0:
            return
        try:
            os.write(fd, ONE)
        except BlockingIOError:
            pass  # the guest has not taken the last one yet: it will look
        except OSError:  # a pipe or socket whose reader went away
            self.device.guest_errors["call_failed"] += 1


def _heads(chains: list[Chain]) -> list[int]:
    return [chain.head for chain in chains]


def _check_fds(order: StartRing | RingFdsChanged) -> None:
    """Refuse a ring without a kick, and descriptors that could make us wait; a full one must not stop us either.

    Not blocking is harmless to the other side: vhost-user front-ends poll these (QEMU, Linux UML and ours).

    Raises:
        VhostUserError: "ring_fd".
    """
    if order.kick_fd < 0:
        raise VhostUserError("ring_fd", f"ring {order.index} has no kick descriptor; polling is not served")
    for fd in (order.kick_fd, order.call_fd, order.err_fd):
        if fd < 0:
            continue
        mode = os.fstat(fd).st_mode
        # Linux UML interrupts through a pipe. A file could belong to a file system that answers when it likes.
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or _is_eventfd(fd)):
            raise VhostUserError("ring_fd", f"ring {order.index}: no eventfd, pipe or socket")
        os.set_blocking(fd, False)


def _is_eventfd(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("anon_inode:[eventfd]")  # noqa: PTH115 - no path
