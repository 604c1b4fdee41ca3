"""The balloon device's hands: guest RAM as the front-end shared it, the running rings, and what chains do.

Rule 1: chains go back to the guest in the pass that took them; nothing waits for anybody.
Rule 2: inflated pages are punched before their chain goes back: afterwards the guest may deflate and use them
        (virtio 1.2 section 5.5.6.2).
Rule 3: every store of the device is logged after it was made: used rings and punched pages.
Rule 4: a pass is at most one ring full of chains; whoever calls decides whether there is another.
Rule 5: the guest's mistakes are counted in `BalloonDevice.guest_errors` and cost it the chain, or the ring.
"""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from host.clock import now_ns
from host.guest_memory import punch_hole
from migration.pages import PAGE_BYTES, runs_of
from virtio.balloon import (
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    has,
)
from virtio.balloon_device import reader
from virtio.errors import VhostUserError
from virtio.hint_session import HintRange, HintStarted, HintStopped, RejectedRange, StaleRange
from virtio.split_ring import DeviceRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.device_log import DeviceLog
    from migration.pages import U64Array
    from virtio.balloon_device import BalloonDevice
    from virtio.hint_session import HintEvent
    from virtio.split_ring import Chain
    from virtio.vhost_user import RingFdsChanged, StartRing

ONE = (1).to_bytes(8, "little")  # what an eventfd counts up by


@dataclass(frozen=True, slots=True, eq=False)
class HintBatch:
    """What one pass over the hint queue brought.

    Attributes:
        command_id: the id issued last; the ranges are for it.
        events: "started" and "stopped", in order, as the guest said them for this id.
        pfn_first, page_count: valid ranges of whole pages, in the guest's order; they may overlap.
        stale_pages: pages hinted for another id, or after the id was closed.
        rejected_ranges: ranges and commands that no guest may send.
        at_ns: CLOCK_MONOTONIC.
    """

    command_id: int
    events: tuple[str, ...]
    pfn_first: U64Array
    page_count: U64Array
    stale_pages: int
    rejected_ranges: int
    at_ns: int

    @property
    def started(self) -> bool:
        """Whether the guest began its report in this pass."""
        return "started" in self.events

    @property
    def stopped(self) -> bool:
        """Whether the guest ended its report in this pass."""
        return "stopped" in self.events


@dataclass(slots=True)
class _Served:
    """A running ring and its descriptors, which are the vhost-user session's."""

    ring: DeviceRing
    kick_fd: int
    call_fd: int
    err_fd: int


class BalloonQueues:
    """One thread only. `device` outlives the front-end's connections; memory and rings do not."""

    def __init__(self, device: BalloonDevice, log: DeviceLog, sink: Callable[[HintBatch], None]) -> None:
        self.device = device
        self.bases = [0] * QUEUE_COUNT  # next_avail of every ring when it was last stopped
        self.command_id = 0  # the one issued last
        self.inflated_pages = 0
        self.deflated_pages = 0
        self.quiet = threading.Event()  # no ring is served; other threads may wait for it
        self.quiet.set()
        self._log = log
        self._sink = sink
        self._fd = -1
        self._first_page = 0
        self._memory = memoryview(b"")
        self._read = reader(self._memory)
        self._served: dict[int, _Served] = {}

    # --- set-up -----------------------------------------------------------------------------------

    @property
    def mapped(self) -> bool:
        """Whether guest RAM is shared with us."""
        return self._fd >= 0

    @property
    def running(self) -> frozenset[int]:
        """Numbers of the rings that are served."""
        return frozenset(self._served)

    def ring_bases(self) -> tuple[int, ...]:
        """The next avail index of every ring, running or stopped."""
        bases = list(self.bases)
        for index, served in self._served.items():
            bases[index] = served.ring.next_avail
        return tuple(bases)

    def map_region(self, fd: int, guest_address: int, size: int) -> None:
        """Map guest RAM instead of what was mapped; takes `fd` over. No ring may be running.

        Raises VhostUserError ("region") for a file that is too short or cannot be mapped.
        """
        assert not self._served, "memory changed under running rings"
        self.unmap()
        end, length = guest_address + size, os.fstat(fd).st_size
        problem = ""
        if length < end or guest_address % PAGE_BYTES or size % PAGE_BYTES:
            problem = (
                f"{guest_address:#x}+{size:#x} of a file of {length:#x} bytes"  # would answer with SIGBUS
            )
        else:
            try:
                mapping = mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            except (OSError, ValueError, OverflowError) as error:
                problem = f"cannot be mapped: {error}"
        if problem:
            os.close(fd)
            raise VhostUserError("region", problem)
        self._fd, self._first_page = fd, guest_address // PAGE_BYTES
        self._memory = memoryview(mapping)
        self._read = reader(self._memory)
        self.device.pages = end // PAGE_BYTES

    def unmap(self) -> None:
        """Let go of guest RAM. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._memory = memoryview(b"")
            self._read = reader(self._memory)

    def start(self, order: StartRing) -> None:
        """Serve a ring. Raises GuestProtocolError ("ring_layout"), or VhostUserError when it cannot be."""
        if order.kick_fd < 0:
            raise VhostUserError(
                "ring_fd", f"ring {order.index} has no kick descriptor; polling is not served"
            )
        if not self.mapped:
            raise VhostUserError("ring_memory", f"ring {order.index} starts before there is memory")
        features = self.device.features
        ring = DeviceRing(
            self._memory,
            order.layout,
            next_avail=order.base,
            event_idx=has(features, F_RING_EVENT_IDX),
            indirect=has(features, F_RING_INDIRECT_DESC),
        )
        self.quiet.clear()
        self._served[order.index] = _Served(ring, order.kick_fd, order.call_fd, order.err_fd)
        _unblock(order.kick_fd, order.call_fd, order.err_fd)

    def change_fds(self, order: RingFdsChanged) -> None:
        """A running ring has other descriptors now. Raises VhostUserError when it loses its kick."""
        if order.kick_fd < 0:
            raise VhostUserError(
                "ring_fd", f"ring {order.index} lost its kick descriptor; polling is not served"
            )
        served = self._served[order.index]
        served.kick_fd, served.call_fd, served.err_fd = order.kick_fd, order.call_fd, order.err_fd
        _unblock(order.kick_fd, order.call_fd, order.err_fd)

    def kick_fd(self, index: int) -> int:
        """The descriptor that tells of new chains."""
        return self._served[index].kick_fd

    def stop(self, index: int) -> int:
        """Touch a ring no more; returns its next avail index. Every store into it is logged by now."""
        served = self._served.pop(index, None)
        if served is not None:
            self.bases[index] = served.ring.next_avail
            self._log.add_stores(served.ring.take_stores())
            served.ring.close()
        if not self._served:
            self.quiet.set()
        return self.bases[index]

    # --- work -------------------------------------------------------------------------------------

    def serve(self, index: int) -> bool:
        """One pass over a ring; whether it found anything. The ring may have been stopped meanwhile."""
        served = self._served.get(index)
        if served is None:
            return False
        if index == QUEUE_HINT:
            found, batch = self._take_hints(served)
            if batch is not None:
                self._sink(batch)
            return found
        return self._exchange(served, self._handler_of(index))

    def drain_hints(self, passes_max: int) -> HintBatch:
        """Everything the hint queue holds now, as one batch that the sink does not see.

        A guest that adds faster than we take is cut off after `passes_max` passes: the rest is stale.
        """
        events: list[HintEvent] = []
        served = self._served.get(QUEUE_HINT)
        if served is not None:
            for _ in range(passes_max):
                if not self._exchange(served, lambda chains: self._collect(chains, events)):
                    break
        return self._batch(events)

    def broken(self, index: int) -> bool:
        """Whether the guest ruined this ring: it is served no more until it is set up again."""
        served = self._served.get(index)
        return served is not None and served.ring.broken is not None

    def _exchange(self, served: _Served, handle: Callable[[list[Chain]], None]) -> bool:
        """Take chains, handle them, give them back, interrupt; whether there was anything at all."""
        ring = served.ring
        chains = ring.pop_all()
        if chains:
            handle(chains)
            ring.push_many([chain.head for chain in chains])
        interrupt = ring.publish()
        self._log.add_stores(ring.take_stores())
        errors = ring.take_errors()
        self.device.count_errors(errors)
        if interrupt:
            self._signal(served.call_fd)
        if ring.broken is not None and errors:
            self._signal(served.err_fd)
        return bool(chains or errors) and ring.broken is None

    def _handler_of(self, index: int) -> Callable[[list[Chain]], None]:
        if index == QUEUE_INFLATE:
            return self._inflate
        return self._deflate if index == QUEUE_DEFLATE else self._refuse

    def _refuse(self, chains: list[Chain]) -> None:
        self.device.guest_errors["queue_not_negotiated"] += len(chains)

    def _deflate(self, chains: list[Chain]) -> None:
        for chain in chains:
            self.deflated_pages += len(self.device.process_deflate(chain, self._read).pfns)

    def _inflate(self, chains: list[Chain]) -> None:
        named = [self.device.process_inflate(chain, self._read).pfns for chain in chains]
        pfns = np.unique(np.concatenate(named)).astype(np.uint64)
        inside = pfns[pfns >= self._first_page]
        self.device.guest_errors["pfn_range"] += len(pfns) - len(inside)
        for first, count in zip(*(part.tolist() for part in runs_of(inside)), strict=True):
            try:
                punch_hole(self._fd, first * PAGE_BYTES, count * PAGE_BYTES)
            except OSError:
                # The page keeps its storage and content, which is no wrong, only no gain: say so.
                self.device.guest_errors["punch_failed"] += 1
        self._log.add_pages(inside)
        self.inflated_pages += len(inside)

    def _take_hints(self, served: _Served) -> tuple[bool, HintBatch | None]:
        events: list[HintEvent] = []
        found = self._exchange(served, lambda chains: self._collect(chains, events))
        return found, self._batch(events) if events else None

    def _collect(self, chains: list[Chain], events: list[HintEvent]) -> None:
        for chain in chains:
            events += self.device.process_hint(chain, self._read)

    def _batch(self, events: list[HintEvent]) -> HintBatch:
        ranges = [(event.pfn_first, event.page_count) for event in events if isinstance(event, HintRange)]
        runs = np.array(ranges, dtype=np.uint64).reshape(-1, 2)
        return HintBatch(
            command_id=self.command_id,
            events=tuple(
                "started" if isinstance(event, HintStarted) else "stopped"
                for event in events
                if isinstance(event, HintStarted | HintStopped)
            ),
            pfn_first=np.ascontiguousarray(runs[:, 0]),
            page_count=np.ascontiguousarray(runs[:, 1]),
            stale_pages=sum(event.pages for event in events if isinstance(event, StaleRange)),
            rejected_ranges=sum(isinstance(event, RejectedRange) for event in events),
            at_ns=now_ns(),
        )

    def _signal(self, fd: int) -> None:
        if fd < 0:
            return
        try:
            os.write(fd, ONE)
        except BlockingIOError:
            pass  # the guest has not taken the last one yet: it will look
        except OSError:  # a pipe or socket whose reader went away
            self.device.guest_errors["call_failed"] += 1


def _unblock(*fds: int) -> None:
    """A guest that fills its own eventfd must not stop us.

    Harmless to the other side: vhost-user front-ends poll these descriptors (QEMU, Linux UML and ours).
    """
    for fd in fds:
        if fd >= 0:
            os.set_blocking(fd, False)
