"""Fast ballooning, out of memory, and compaction, with the guest's real driver and the host's real device.

What they prove: every page that the driver says is ballooned left the host, and every one it took back is whole;
out of memory nothing is allocated to get memory back; a ballooned page can be moved; and the order of locks that
deadlocked the historic driver does so here too, while ours does not.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from guest_agent.frames import FrameKind
from guest_agent.xbitmap import XBitmap
from host.balloon_server import BalloonServer, DeviceState
from host.device_log import DeviceLog
from host.guest_memory import HostRam
from tests.live.balloon_guest import Guest, fixture_device, fixture_guests, wait_until
from virtio.balloon import CMD_ID_FIRST, F_SG, BalloonConfig, has
from virtio.balloon_device import FEATURES_DEFAULT

guests = fixture_guests
device = fixture_device

MEMORY_BYTES = 64 << 20


class Spy:
    """What crosses one queue of the device: buffers as (first page, pages), by pass."""

    def __init__(self, device: BalloonServer, queue: str, order: list[str]) -> None:
        self.passes: list[list[tuple[int, int]]] = []
        work: Callable[..., None] = getattr(device._queues.pages, queue)

        def seen(region: Any, chains: Any) -> None:
            order.append(queue)
            buffers = [
                (address >> 12, length >> 12) for chain in chains for address, length in chain.writable
            ]
            self.passes.append(buffers)
            work(region, chains)

        setattr(device._queues.pages, queue, seen)

    @property
    def buffers(self) -> list[tuple[int, int]]:
        return [buffer for one in self.passes for buffer in one]


def inflated(guest: Guest, device: BalloonServer, pages: int) -> None:
    """Start the guest and have a balloon of so many pages."""
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    resize(guest, device, pages)


def resize(guest: Guest, device: BalloonServer, pages: int) -> None:
    device.set_num_pages(pages)
    wait_until(lambda: device.status().actual == pages, f"a balloon of {pages} pages")
    assert guest.balloon.ballooned_pages == pages


def checker_board(guest: Guest) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Use all free memory, then free every second page: no two free pages are neighbours. The pages still used."""
    pfns = np.sort(guest.take(guest.buddy.free_pages))
    with guest.gate:
        guest.buddy.free_bulk(pfns[::2])
    return pfns[1::2]


def resident(guest: Guest) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pages of the guest have storage at the host."""
    ram = HostRam(os.dup(guest.ram.fd), guest.ram.memory_bytes)
    try:
        return ram.populated()
    finally:
        ram.close()


# --- fast ballooning ----------------------------------------------------------------------------------


def test_an_idle_guest_is_ballooned_in_a_few_long_entries(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    order: list[str] = []
    spy = Spy(device, "inflate", order)
    guest = guests(1 << 30)
    inflated(guest, device, 200_000)
    assert has(guest.balloon.features, F_SG)
    assert sum(count for _, count in spy.buffers) == 200_000
    assert len(spy.buffers) < 50
    resize(guest, device, 0)
    assert guest.buddy.check() == []
    assert device.status().guest_errors == {}


@pytest.mark.parametrize(
    ("offered", "wanted"),
    [(True, True), (False, True), (True, False)],
    ids=["both", "device-without", "driver-without"],
)
def test_runs_and_arrays_interoperate_by_negotiation(
    guests: Callable[..., Guest], tmp_path: Path, offered: bool, wanted: bool
) -> None:
    """Scattered memory, the worst case: more runs than the ring holds, in both directions."""
    features = FEATURES_DEFAULT if offered else FEATURES_DEFAULT & ~(1 << F_SG)
    server = BalloonServer(
        tmp_path / "vhost", sink=lambda _: None, log=DeviceLog(), features_offered=features
    )
    server.start()
    try:
        order: list[str] = []
        spy = Spy(server, "inflate", order)
        guest = guests(MEMORY_BYTES, sg=wanted)
        guest.start()
        wait_until(lambda: server.status().ready, "balloon ready")
        used = checker_board(guest)
        guest.ram.words[used, 0] = used
        pages = guest.buddy.free_pages - guest.buddy.reserve_pages
        resize(guest, server, pages)
        assert has(guest.balloon.features, F_SG) == (offered and wanted)
        if offered and wanted:
            assert sorted(spy.buffers) == sorted(set(spy.buffers))
            assert [count for _, count in spy.buffers] == [1] * pages
        assert (server.status().inflated_pages, server.status().guest_errors) == (pages, {})
        assert (guest.ram.words[used, 0] == used).all(), "only ballooned pages left the host"
        resize(guest, server, 10)
        assert guest.buddy.free_pages >= pages - 10
        resize(guest, server, 0)
        assert server.status().deflated_pages == pages
        assert guest.buddy.check() == []
    finally:
        server.stop()


def test_ballooned_pages_leave_the_host_and_come_back_as_zeros(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    guest = guests(MEMORY_BYTES)
    guest.start()
    pfns = guest.take(10_000)
    guest.ram.words[pfns] = 7
    with guest.gate:
        guest.buddy.free_bulk(pfns)
    wait_until(lambda: device.status().ready, "balloon ready")
    resize(guest, device, 14_000)
    ballooned = guest.frames.pfns_of_kind(FrameKind.BALLOON)
    assert not resident(guest)[ballooned].any()
    resize(guest, device, 0)
    assert (guest.ram.words[ballooned] == 0).all()


def test_a_balloon_makes_the_page_cache_shrink(guests: Callable[..., Guest], device: BalloonServer) -> None:
    """Linux reclaims for its balloon; a cache that filled memory would otherwise keep the host's page."""
    guest = guests(MEMORY_BYTES)
    cache = [guest.buddy.alloc_bulk(12_000, kind=FrameKind.CACHE, owner=3)]

    def shrink(wanted: int) -> int:
        gone, cache[0] = cache[0][:wanted], cache[0][wanted:]
        guest.buddy.free_bulk(gone)
        return int(gone.size)

    guest.buddy.add_pressure_hook(10, shrink)
    inflated(guest, device, 9000)
    assert cache[0].size < 12_000


def test_pages_that_cannot_be_recorded_are_free_again(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    """The historic driver leaked them. Here memory counts as short, and the balloon waits."""
    guest = guests(MEMORY_BYTES)
    free = guest.buddy.free_pages
    guest.balloon._pages._runs[0]._bitmap = XBitmap(leaves_max=2)  # type: ignore[attr-defined]
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    device.set_num_pages(9000)
    wait_until(lambda: guest.balloon._driver._waiting, "the driver to wait for memory")
    guest.gate.pause()  # no attempt is under way
    assert guest.balloon.ballooned_pages == 0
    assert guest.buddy.free_pages == free
    guest.balloon._pages._runs[0]._bitmap = XBitmap()  # type: ignore[attr-defined]
    guest.gate.open()
    resize(guest, device, 9001)


@pytest.mark.parametrize("sg", [True, False], ids=["runs", "arrays"])
def test_a_guest_saved_with_pages_in_flight_goes_on_with_them_elsewhere(
    guests: Callable[..., Guest], tmp_path: Path, sg: bool
) -> None:
    """What the device had not answered is in the rings; what never went out was given back and is no state."""
    guest = guests(1 << 30, sg=sg)
    free = guest.buddy.free_pages
    guest.balloon.negotiate(FEATURES_DEFAULT)
    guest.start(connect=False)
    guest.balloon.config_changed(BalloonConfig(num_pages=200_000))
    pages = guest.balloon._pages
    wait_until(
        lambda: pages.inflate.pages_in_flight > 0 and pages.inflate.recorded_pages > 0, "a batch ahead"
    )
    guest.gate.pause()
    guest.balloon.settle()
    in_flight = pages.inflate.pages_in_flight
    assert (guest.buddy.free_pages, pages.inflate.recorded_pages) == (free - in_flight, 0)
    saved = json.loads(json.dumps([guest.balloon.save(), guest.balloon.save_rings()]))
    assert len(json.dumps(saved)) < 16 * 1024

    device = BalloonServer(tmp_path / "vhost", sink=lambda _: None, log=DeviceLog())
    device.start()
    try:
        other = guests(1 << 30, sg=sg, memfd=os.dup(guest.ram.fd))
        other.balloon.restore(*saved)
        device.adopt_state(
            DeviceState(
                features=other.balloon.features,
                num_pages=200_000,
                actual=0,
                poison_value=0,
                next_command_id=CMD_ID_FIRST,
                hints_open=False,
                ring_bases=(0,) * 5,
            )
        )
        other.start()
        wait_until(lambda: device.status().actual == 200_000, "the rest of the inflation")
        assert device.status().inflated_pages == 200_000, "each page once"
        resize(other, device, 0)
        assert other.buddy.check() == []
    finally:
        device.stop()


# --- out of memory ------------------------------------------------------------------------------------


def test_out_of_memory_deflates_256_single_entries_at_a_time_and_records_nothing(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    order: list[str] = []
    spy = Spy(device, "deflate", order)
    guest = guests(MEMORY_BYTES)
    inflated(guest, device, 9000)
    # A bitmap without a leaf to give: whoever records anything fails.
    guest.balloon._pages._runs[1]._bitmap = XBitmap(leaves_max=0)  # type: ignore[attr-defined]
    guest.take(guest.buddy.free_pages + 1000)
    assert [len(one) for one in spy.passes] == [256] * 4
    assert {count for _, count in spy.buffers} == {1}
    wait_until(lambda: device.status().actual == 9000 - 1024, "the host is told")
    assert guest.buddy.check() == []


def test_pages_allocated_ahead_of_the_device_come_back_first(guests: Callable[..., Guest]) -> None:
    """Allocated, not enqueued: a deflation cannot see them, so the batch is bounded and given back as a whole."""
    guest = guests(MEMORY_BYTES)
    guest.balloon.negotiate(FEATURES_DEFAULT)
    guest.gate.open()
    guest.balloon._driver.num_pages = 5000
    guest.balloon.allocate_ahead(4000)
    assert guest.balloon._pages.inflate.recorded_pages == 4000
    pfns = guest.take(guest.buddy.free_pages + 1)
    assert guest.balloon._pages.inflate.recorded_pages == 0
    assert guest.balloon.ballooned_pages == 0
    assert (guest.frames.kind[pfns.astype(np.int64)] == FrameKind.ANON).all()
    assert guest.buddy.check() == []


# --- the old deadlock ---------------------------------------------------------------------------------


class Deadlock(Exception):
    """Waiting for this lock would close a circle."""


class Watch:
    """Who waits for which lock. A circle is found by whoever closes it, at once: no time-out decides anything."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.waiting: dict[int, WatchedLock] = {}
        self.deadlocks: list[str] = []

    def would_deadlock(self, thread: int) -> bool:
        seen = thread
        while seen in self.waiting:
            owner = self.waiting[seen].owner
            if owner is None:
                return False
            if owner == thread:
                return True
            seen = owner
        return False


class WatchedLock:
    """A re-entrant lock of a Watch."""

    def __init__(self, watch: Watch, name: str) -> None:
        self.watch, self.name = watch, name
        self.owner: int | None = None
        self._depth = 0
        self._lock = threading.RLock()

    def acquire(self, blocking: bool = True) -> bool:
        me = threading.get_ident()
        if not self._lock.acquire(blocking=False):
            if not blocking:
                return False
            with self.watch.guard:
                self.watch.waiting[me] = self
                if self.watch.would_deadlock(me):
                    del self.watch.waiting[me]
                    self.watch.deadlocks.append(self.name)
                    raise Deadlock(self.name)
            self._lock.acquire()
            with self.watch.guard:
                del self.watch.waiting[me]
        self.owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.owner = None
        self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Circle:
    """Inflation that makes a file system shrink, whose lock a writer holds who is out of memory (FACTS 2.3)."""

    def __init__(self, guest: Guest, watch: Watch) -> None:
        self.guest = guest
        self.files = WatchedLock(watch, "file system")
        self.balloon_lock = WatchedLock(watch, "balloon")
        guest.balloon._lock = self.balloon_lock  # type: ignore[assignment]
        self.writer_holds_files = threading.Event()
        self.reclaim_began = threading.Event()
        self.written: list[int] = []
        guest.buddy.add_pressure_hook(10, self.shrink)

    def shrink(self, _: int) -> int:
        self.reclaim_began.set()
        with self.files:
            return 0

    def write(self) -> None:
        with self.files:
            self.writer_holds_files.set()
            assert self.reclaim_began.wait(10)
            try:
                self.written.append(int(self.guest.take(self.guest.buddy.free_pages + 500).size))
            except Deadlock:
                return

    def inflate(self, *, under_the_lock: bool) -> None:
        assert self.writer_holds_files.wait(10)
        wanted = self.guest.buddy.free_pages + 100  # more than there is: reclaim begins
        try:
            if under_the_lock:
                with self.balloon_lock:  # as the driver did before the series split balloon_page_enqueue
                    self.guest.balloon.allocate_ahead(wanted)
            else:
                self.guest.balloon.allocate_ahead(wanted)
        except Deadlock:
            return

    def run(self, *, under_the_lock: bool) -> None:
        threads = [
            threading.Thread(target=self.write),
            threading.Thread(target=self.inflate, kwargs={"under_the_lock": under_the_lock}),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("under_the_lock", [True, False], ids=["old-order", "our-order"])
def test_allocating_under_the_balloons_lock_deadlocks_and_allocating_apart_does_not(
    guests: Callable[..., Guest], device: BalloonServer, under_the_lock: bool
) -> None:
    guest, watch = guests(MEMORY_BYTES), Watch()
    circle = Circle(guest, watch)
    inflated(guest, device, 8000)
    circle.run(under_the_lock=under_the_lock)
    if under_the_lock:
        assert len(watch.deadlocks) == 1
        assert watch.deadlocks[0] in ("balloon", "file system"), "whoever closed the circle"
    else:
        assert watch.deadlocks == []
        assert circle.written, "the writer got its memory, by deflation"
        wait_until(lambda: device.status().actual < 8000, "the host is told")
        assert guest.buddy.check() == []


# --- compaction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sg", [True, False], ids=["runs", "arrays"])
def test_compaction_moves_ballooned_pages_new_place_first_and_each_on_its_queue(
    guests: Callable[..., Guest], device: BalloonServer, sg: bool
) -> None:
    order: list[str] = []
    spies = {queue: Spy(device, queue, order) for queue in ("inflate", "deflate")}
    guest = guests(MEMORY_BYTES, sg=sg)
    inflated(guest, device, 9000)
    checker_board(guest)
    assert not any(guest.buddy.walk_free_blocks(min_order=1)), "no block of two pages anywhere"
    order.clear()
    for spy in spies.values():
        spy.passes.clear()
    before = set(guest.frames.pfns_of_kind(FrameKind.BALLOON).tolist())
    with guest.gate:
        head = guest.buddy.alloc(9, kind=FrameKind.ANON, owner=1)
    after = set(guest.frames.pfns_of_kind(FrameKind.BALLOON).tolist())
    turns = [queue for queue, _ in groupby(order)]  # the device may take one batch in several passes
    assert turns == ["inflate", "deflate", "inflate", "deflate"], "256 pages at a time, the new place first"
    if sg:
        assert {pfn for pfn, _ in spies["inflate"].buffers} == after - before
        assert {pfn for pfn, _ in spies["deflate"].buffers} == before - after
    assert before - after == set(range(head, head + 512))
    assert len(after) == len(before) == 9000
    assert guest.compaction.moved_pages == 512
    assert device.status().inflated_pages == 9000 + 512
    assert device.status().deflated_pages == 512
    wait_until(lambda: guest.balloon.config_handled, "the thread to look")
    assert device.status().actual == 9000
    assert not resident(guest)[sorted(after)].any()
    assert guest.buddy.check() == []


def test_a_busy_balloon_moves_nothing_and_the_pages_stay_whole(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    guest = guests(MEMORY_BYTES)
    inflated(guest, device, 9000)
    checker_board(guest)
    free = guest.buddy.free_pages
    with guest.balloon._lock:  # as while a batch is being enqueued
        done: list[bool] = []
        mover = threading.Thread(target=lambda: done.append(guest.compaction.make_block(9)))
        mover.start()
        mover.join(10)
    assert done == [False]
    assert (guest.balloon.ballooned_pages, guest.buddy.free_pages) == (9000, free)
    assert guest.buddy.check() == []


def test_a_device_that_falls_silent_in_a_move_leaves_two_whole_balloons_worth(
    guests: Callable[..., Guest], device: BalloonServer
) -> None:
    """The new places are the balloon's then, the old ones still are: nothing is free that the host may punch."""
    guest = guests(MEMORY_BYTES)
    inflated(guest, device, 9000)
    checker_board(guest)
    device.stop()
    guest.compaction.make_block(9)
    assert guest.balloon.ballooned_pages == 9000 + 256
    assert guest.buddy.check() == []
    guest.gate.pause(1)
