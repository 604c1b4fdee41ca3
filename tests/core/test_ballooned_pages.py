"""Pages in the balloon: neither read nor sent, unless the guest wrote them, and never forgotten when deflated."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from host.ballooned import BalloonedPages, ballooned_for_good, ballooned_holes, give_back, pack, unpack
from host.device_log import DeviceLog
from host.guest_memory import HostRam
from host.trackers import HashTracker, UffdTracker
from migration.errors import RemoteProtocolError
from migration.page_bits import PageBits
from migration.pages import PAGE_BYTES

PAGES = 256


def runs(*pairs):
    return np.array([a for a, _ in pairs], np.uint64), np.array([b for _, b in pairs], np.uint64)


def members(mask):
    return np.flatnonzero(mask).tolist()


class FakeScanner:
    """Answers what the test says the guest wrote."""

    def __init__(self):
        self.written = set()

    def scan_and_protect(self):
        mask = np.zeros(PAGES, np.bool_)
        mask[list(self.written)] = True
        self.written.clear()
        return PageBits.of(mask)


class FakeBalloon:
    def __init__(self):
        self.pages = BalloonedPages()

    def ballooned(self, pages):
        return self.pages.bits(pages)


@pytest.fixture
def balloon():
    return FakeBalloon()


@pytest.fixture
def ram():
    made = HostRam.create(PAGES * PAGE_BYTES)
    yield made
    made.close()


def test_the_set_grows_with_what_it_is_told_and_forgets_what_is_deflated():
    pages = BalloonedPages()
    assert not pages.bits(8).any()
    pages.remove(*runs((100, 4)))
    pages.add(*runs((2, 3), (10, 1)))
    pages.remove(*runs((3, 1), (9, 1000)))
    assert members(pages.bits(16)) == [2, 4]
    assert members(pages.bits(3)) == [2]


def test_the_set_travels():
    mask = np.zeros(1001, np.bool_)
    mask[[0, 17, 1000]] = True
    assert (unpack(pack(PageBits.of(mask)), 1001).mask() == mask).all()
    assert pack(PageBits(5)) == b""
    assert not unpack(b"", 5).any()


@pytest.mark.parametrize(
    "lie", [b"no zlib", zlib.compress(bytes(12)), zlib.compress(bytes(1 << 20)), pack(PageBits.full(64))[:-2]]
)
def test_a_set_of_another_guest_is_refused_however_large_it_would_become(lie):
    with pytest.raises(RemoteProtocolError):
        unpack(lie, 64)


def test_only_holes_of_the_balloon_are_left_out_of_the_first_round(balloon, ram):
    assert ballooned_holes(balloon, ram) is None
    balloon.pages.add(*runs((8, 4)))
    ram.store(*runs((9, 1)), memoryview(bytes([7]) * PAGE_BYTES))  # used before it was deflated
    assert members(ballooned_holes(balloon, ram)) == [8, 10, 11]


def test_what_the_balloon_took_is_left_out_until_it_is_deflated(balloon):
    scanner, log = FakeScanner(), DeviceLog()
    tracker = UffdTracker(scanner, log, balloon.ballooned)
    balloon.pages.add(*runs((8, 4)))
    log.add_runs(*runs((8, 4), (20, 2)))  # 20 and 21 were reported, not ballooned
    scanner.written = {1, 9}  # 9: by a guest that does not wait to be told
    assert members(tracker.harvest()) == [1, 9, 20, 21]
    assert members(tracker.left_out) == [8, 10, 11]
    balloon.pages.remove(
        *runs((10, 1))
    )  # deflated and not written: the destination may hold what it was before
    assert members(tracker.harvest()) == [10]
    assert members(tracker.harvest()) == []
    assert members(tracker.left_out) == [8, 11]


def test_what_the_next_host_need_not_have_is_held_and_never_sent_or_left_out_at_the_end():
    held, left_out = PageBits(PAGES), PageBits(PAGES)
    held.add_runs(*runs((8, 4)))
    left_out.add_runs(*runs((9, 1), (20, 1)))  # 20 is the guest's again
    sent = np.zeros(PAGES, np.uint64)
    sent[[9, 10, 20]] = 7
    assert members(ballooned_for_good(held, sent, left_out)) == [8, 9, 11]
    assert members(ballooned_for_good(held, sent, None)) == [8, 11]
    assert not ballooned_for_good(PageBits(PAGES), sent, left_out).any()


def test_hashes_leave_out_what_the_balloon_took_and_see_what_was_written(balloon, ram):
    ram.store(*runs((8, 4)), memoryview(bytes([7]) * 4 * PAGE_BYTES))
    log, sent = DeviceLog(), np.zeros(PAGES, np.uint64)
    tracker = HashTracker(ram, sent, log, balloon.ballooned)
    tracker.start()
    ram.punch(8, 4)
    balloon.pages.add(*runs((8, 4)))
    log.add_runs(*runs((8, 4)))
    ram.store(*runs((9, 1)), memoryview(bytes([5]) * PAGE_BYTES))
    assert members(tracker.harvest()) == [9]
    balloon.pages.remove(*runs((8, 4)))
    assert members(tracker.harvest()) == [8, 9, 10, 11]


def test_the_destination_gives_back_what_was_ballooned_after_it_was_sent(ram):
    ram.store(*runs((4, 8)), memoryview(bytes([7]) * 8 * PAGE_BYTES))
    mask = np.zeros(PAGES, np.bool_)
    mask[[5, 6, 30]] = True
    stored = np.ones(PAGES, np.uint64)
    stored[30] = 0
    give_back(ram, PageBits.of(mask), stored)
    assert members(ram.populated()) == [4, 7, 8, 9, 10, 11]
