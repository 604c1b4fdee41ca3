"""Both hint drivers against a ring that the test looks at: the driver that holds and the one that walks.

What they prove: the shape of a report (id, blocks, STOP, with a slot kept for it), what a full ring, a host that
changes its mind and memory pressure do to it, and that a held block whose acknowledgement is awaited is nobody's
before.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from guest_agent.balloon_options import HINTS_HOLD, HINTS_WALK
from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.hint_report import RELEASE_FILLED_PAGES, HintReport
from guest_agent.hint_walk import WALK_ORDER_MIN, hint_report
from guest_agent.poison import Poison
from guest_agent.ram import GuestRam
from guest_agent.ring_area import RING_SIZES, RingArea
from virtio.balloon import CMD_ID_FIRST, CMD_ID_STOP, QUEUE_HINT
from virtio.split_ring import DeviceRing, DriverRing

ID = CMD_ID_FIRST
BLOCK = 1024


class Bench:
    """A guest's memory, a hint driver, and the device's end of its queue."""

    def __init__(self, driver: str, memory_bytes: int) -> None:
        self.ram = GuestRam.create(memory_bytes)
        boot = BootPage.format(self.ram)
        self.frames = FrameTable(self.ram, boot)
        self.buddy = BuddyAllocator(self.ram, boot, self.frames)
        area = RingArea(boot.ring_address)
        self.wanted = True
        self.kicks = 0
        self.driver_ring = DriverRing(self.ram.memory, area.layouts[QUEUE_HINT])
        self.device = DeviceRing(self.ram.memory, area.layouts[QUEUE_HINT])
        self.report: HintReport = hint_report(
            driver,
            lambda: self.wanted,
            ring=self.driver_ring,
            area=area,
            memory=self.ram.memory,
            frames=self.frames,
            buddy=self.buddy,
            kick=self.kick,
        )

    def kick(self) -> None:
        self.kicks += 1

    def close(self) -> None:
        self.driver_ring.close()
        self.device.close()
        self.ram.close()

    def begin(self, steps: int = 0, command_id: int = ID) -> None:
        self.report.start(command_id)
        for _ in range(steps):
            self.report.step()

    def run(self, command_id: int = ID) -> list[tuple[int, int]]:
        """A whole report with a device that answers at once; what it saw."""
        self.begin(command_id=command_id)
        seen = []
        while self.report.is_open:
            self.report.step()
            seen += self.take()
        return seen + self.take()

    def take(self, count: int = 1 << 16) -> list[tuple[int, int]]:
        """What waits in the ring, given back: (-1, command) or (first page, pages)."""
        seen = []
        for _ in range(count):
            chain = self.device.pop()
            if chain is None:
                break
            if chain.readable:
                address, length = chain.readable[0]
                assert length == 4
                seen.append((-1, int.from_bytes(self.ram.memory[address : address + 4], "little")))
            else:
                address, length = chain.writable[0]
                seen.append((address // 4096, length // 4096))
            self.device.push(chain.head, 0)
        self.device.publish()
        return seen


@pytest.fixture(name="bench")
def fixture_bench() -> Iterator[Any]:
    made: list[Bench] = []

    def make(driver: str, memory_bytes: int = 256 << 20) -> Bench:
        made.append(Bench(driver, memory_bytes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("driver", [HINTS_HOLD, HINTS_WALK])
def test_a_report_is_the_id_then_free_blocks_then_stop(bench: Any, driver: str) -> None:
    guest: Bench = bench(driver)
    free = guest.frames.kind == FrameKind.FREE
    seen = guest.run()
    assert (seen[0], seen[-1]) == ((-1, ID), (-1, CMD_ID_STOP))
    blocks = seen[1:-1]
    hinted = np.concatenate([np.arange(pfn, pfn + pages) for pfn, pages in blocks])
    assert free[hinted].all()
    assert np.unique(hinted).size == hinted.size > 0.9 * free.sum()
    assert guest.report.take_ended() == ID


def test_the_driver_that_walks_holds_nothing_and_goes_down_to_small_blocks(bench: Any) -> None:
    guest: Bench = bench(HINTS_WALK)
    taken = guest.buddy.alloc_bulk(2048, kind=FrameKind.ANON, owner=7)
    guest.buddy.free_bulk(taken[np.arange(2048) % 40 != 0])  # pieces of some pages each
    free = guest.buddy.free_pages
    blocks = guest.run()[1:-1]
    assert guest.buddy.free_pages == free
    assert guest.report.held_pages == guest.report.give_back(1000) == 0
    assert min(pages for _, pages in blocks) == 1 << WALK_ORDER_MIN
    assert guest.buddy.check() == []


def test_the_driver_that_holds_takes_the_largest_blocks_until_done(bench: Any) -> None:
    guest: Bench = bench(HINTS_HOLD)
    blocks = guest.run()[1:-1]
    assert {pages for _, pages in blocks} == {BLOCK}
    assert guest.report.held_pages == len(blocks) * BLOCK
    assert guest.report.release() == len(blocks) * BLOCK
    assert guest.report.held_pages == 0
    assert guest.buddy.check() == []


def test_a_walk_into_a_full_ring_skips_blocks_kicks_and_ends_with_stop(bench: Any) -> None:
    """Nobody takes anything: the ring holds the id, as many blocks as fit, and STOP in the slot kept for it."""
    guest: Bench = bench(HINTS_WALK, 6 << 30)  # 1536 blocks; nothing of it is touched
    guest.begin(steps=3)
    assert not guest.report.is_open
    assert guest.report.skipped_blocks > 300
    assert guest.kicks > 3
    seen = guest.take()
    assert len(seen) == RING_SIZES[QUEUE_HINT]
    assert (seen[0], seen[-1]) == ((-1, ID), (-1, CMD_ID_STOP))


def test_a_walk_uses_the_room_that_the_device_makes_meanwhile(bench: Any) -> None:
    guest: Bench = bench(HINTS_WALK, 6 << 30)
    seen: list[tuple[int, int]] = []
    guest.kick = lambda: seen.extend(guest.take())  # type: ignore[method-assign]
    guest.report._kick = guest.kick
    guest.begin(steps=3)
    assert guest.report.skipped_blocks == 0
    assert len(seen) - 2 > RING_SIZES[QUEUE_HINT]


def test_a_walk_ends_when_the_host_wants_another_id(bench: Any) -> None:
    guest: Bench = bench(HINTS_WALK)
    guest.begin(steps=1)
    guest.wanted = False
    guest.report.step()
    guest.report.step()
    assert len(guest.take()) == 3, "the id, the block that was under way, STOP"
    assert guest.report.take_ended() == ID


@pytest.mark.parametrize("driver", [HINTS_HOLD, HINTS_WALK])
def test_what_is_done_before_the_kick_comes_after_the_hint_and_before_the_device(
    bench: Any, driver: str
) -> None:
    guest: Bench = bench(driver)
    calls: list[tuple[int, bool, bool]] = []

    def hook(first: Any, count: Any, give_back: Any, untouched: Any) -> None:
        del give_back
        before = guest.kicks
        honest = untouched()
        seen = guest.take()  # a device that looks without having been told
        ranges = list(zip(first.tolist(), count.tolist(), strict=True))
        assert seen[0] == (-1, ID)
        assert seen[1:] == ranges
        calls.append((before, honest, untouched()))

    guest.report.before_kick = hook
    guest.begin(steps=2)
    assert calls == [(0, True, False)], "no kick before; and a device that was faster is noticed"
    assert guest.kicks == 1


def awaiting(guest: Bench) -> list[tuple[int, int]]:
    guest.report.wait_on_ack = True
    guest.begin(steps=2)
    held = guest.report.held_pages
    assert held > 10 * BLOCK
    return guest.take(4)  # the id and three blocks are acknowledged


def test_blocks_that_the_device_still_has_are_not_given_back_under_pressure(bench: Any) -> None:
    guest: Bench = bench(HINTS_HOLD)
    acknowledged = awaiting(guest)[1:]
    guest.report.settle()
    held = guest.report.held_pages
    assert guest.report.give_back(held) == 3 * BLOCK
    kinds = [guest.frames.kind[pfn] for pfn, _ in acknowledged]
    assert kinds == [FrameKind.FREE] * 3
    assert guest.report.give_back(held) == 0
    assert guest.report.held_pages == held - 3 * BLOCK


def test_done_gives_back_the_rest_as_the_device_acknowledges_it(bench: Any) -> None:
    guest: Bench = bench(HINTS_HOLD)
    awaiting(guest)
    guest.report.settle()
    held = guest.report.held_pages
    assert guest.report.release() == 3 * BLOCK
    assert guest.report.save()["release_owed"]
    guest.take()
    guest.report.settle()
    assert guest.report.held_pages == 0
    assert not guest.report.save()["release_owed"]
    assert held > 3 * BLOCK
    assert guest.buddy.check() == []


def test_a_guest_that_fills_what_it_frees_gets_its_blocks_back_piece_by_piece(bench: Any) -> None:
    """Filling a GiB takes as long as a guest may at most be asked to wait for its pause."""
    guest: Bench = bench(HINTS_HOLD)
    guest.buddy.poison = Poison(guest.ram, 0)
    guest.run()
    held = guest.report.held_pages
    assert held > 3 * RELEASE_FILLED_PAGES
    assert guest.report.release() == RELEASE_FILLED_PAGES
    steps = 0
    while guest.report.has_work:
        before = guest.report.held_pages
        guest.report.step()
        assert 0 < before - guest.report.held_pages <= RELEASE_FILLED_PAGES
        steps += 1
    assert steps == -(-held // RELEASE_FILLED_PAGES) - 1
    assert guest.report.held_pages == 0
    assert guest.buddy.check() == []


def test_a_new_report_ends_a_release_that_was_owed(bench: Any) -> None:
    guest: Bench = bench(HINTS_HOLD)
    awaiting(guest)
    guest.report.settle()
    guest.report.release()
    guest.report.end()
    while guest.report.is_open:
        guest.report.step()
    guest.report.start(ID + 1)
    assert not guest.report.save()["release_owed"]
