"""Dirty trackers: nothing written is missed, by whomever it was written, and nothing is silently degraded."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from host.device_log import COMPACT_ABOVE, DeviceLog
from host.errors import TrackerUnavailable
from host.guest_memory import HostRam
from host.pagemap import WriteScanner
from host.trackers import HashTracker, UffdTracker, choose
from migration.codec import page_hashes
from migration.pages import PAGE_BYTES

PAGES = 4096
CHILD = Path(__file__).with_name("host_tracked_child.py")


def set_pages(mask):
    return np.flatnonzero(mask).tolist()


class TrackedGuest:
    """A child process with RAM under asynchronous write protection, as a guest agent has it."""

    def __init__(self, pages=PAGES):
        ours, theirs = os.pipe(), os.pipe()
        self.memfd = os.memfd_create("guest")
        os.ftruncate(self.memfd, pages * PAGE_BYTES)
        self.process = subprocess.Popen(
            [sys.executable, str(CHILD), str(self.memfd), str(pages * PAGE_BYTES)],
            stdin=ours[0],
            stdout=theirs[1],
            pass_fds=[self.memfd],
            text=True,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = os.fdopen(ours[1], "w"), os.fdopen(theirs[0])
        self.base_address, pagemap, self.reason = self.ask("ram").split(" ", 2)
        if not self.reason:
            self.pagemap_fd = os.open(f"/proc/{self.process.pid}/fd/{pagemap}", os.O_RDONLY)

    def ask(self, order):
        print(order, file=self._to, flush=True)
        assert select.select([self._from], [], [], 30)[0], "the child does not answer"
        return self._from.readline().rstrip("\n")

    def write(self, *pfns):
        self.ask("write " + " ".join(map(str, pfns)))

    def close(self):
        self._to.close()
        self._from.close()
        self.process.wait()
        os.close(self.memfd)


@pytest.fixture
def guest():
    made = TrackedGuest()
    if made.reason:
        made.close()
        pytest.skip(f"no write tracking on this machine: {made.reason}; `ballast doctor` says what to do")
    yield made
    made.close()


@pytest.fixture
def scanner(guest):
    made = WriteScanner(guest.pagemap_fd, int(guest.base_address), PAGES)
    yield made
    made.close()


# --- the kernel's tracker -------------------------------------------------------------------------


def test_the_first_scan_says_everything_and_later_ones_what_was_written(guest, scanner):
    guest.write(1, 2)
    assert scanner.scan_and_protect().all()
    assert not scanner.scan_and_protect().any()
    guest.write(0, 7, 8, 9, PAGES - 1)
    assert set_pages(scanner.scan_and_protect()) == [0, 7, 8, 9, PAGES - 1]
    assert not scanner.scan_and_protect().any()


def test_many_scattered_pages_take_the_other_way_to_the_mask(guest, scanner):
    scanner.scan_and_protect()
    wanted = list(range(0, PAGES, 3))
    guest.ask(f"stride 0 {PAGES} 3")
    assert set_pages(scanner.scan_and_protect()) == wanted


def test_more_regions_than_one_answer_holds(guest, scanner):
    scanner._regions = np.zeros((16, 3), np.uint64)
    scanner.scan_and_protect()
    guest.ask(f"stride 1 {PAGES} 2")
    assert set_pages(scanner.scan_and_protect()) == list(range(1, PAGES, 2))


def test_no_write_is_lost_while_the_guest_writes_on(guest, scanner):
    """Every page that a writing guest touched shows up in one of the concurrent harvests."""
    scanner.scan_and_protect()
    seen = np.zeros(PAGES, np.bool_)
    done = threading.Event()

    def write():
        guest.ask(f"stride 0 {PAGES} 1")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen |= scanner.scan_and_protect()
    writer.join()
    seen |= scanner.scan_and_protect()
    assert seen.all()


def test_hazard_device_stores_are_in_the_harvest(guest, scanner):
    """The kernel does not report what another process stores; the device's own log must."""
    log = DeviceLog()
    tracker = UffdTracker(scanner, log)
    log.add(0, 1)  # before the start: the first round's matter
    tracker.start()
    os.pwrite(guest.memfd, b"used ring", 5 * PAGE_BYTES)
    assert not tracker.harvest().any()
    log.add(5 * PAGE_BYTES, 9)
    guest.write(9)
    assert set_pages(tracker.harvest()) == [5, 9]
    assert not tracker.harvest().any()
    tracker.stop()


def test_hazard_a_punched_page_is_in_the_harvest_only_through_the_log(guest, scanner):
    log = DeviceLog()
    tracker = UffdTracker(scanner, log)
    guest.write(20, 21)
    tracker.start()
    ram = HostRam(os.dup(guest.memfd), PAGES * PAGE_BYTES)
    ram.punch(20, 2)
    log.add_pages(np.array([20, 21], np.uint64))
    ram.close()
    assert set_pages(tracker.harvest()) == [20, 21]


def test_memory_that_is_not_tracked_is_refused_and_not_called_clean(guest):
    wrong = WriteScanner(os.dup(guest.pagemap_fd), int(guest.base_address) + PAGE_BYTES, PAGES)
    with pytest.raises(TrackerUnavailable, match="not registered"):
        wrong.scan_and_protect()
    wrong.close()
    wrong.close()


def test_a_guest_that_ended_is_refused_and_not_called_clean(guest, scanner):
    scanner.scan_and_protect()
    guest.process.kill()
    guest.process.wait()
    with pytest.raises(TrackerUnavailable):
        scanner.scan_and_protect()


def test_a_descriptor_that_is_no_pagemap_is_refused():
    scanner = WriteScanner(os.open("/dev/null", os.O_RDONLY), 0, 1)
    with pytest.raises(TrackerUnavailable, match="PAGEMAP_SCAN failed"):
        scanner.scan_and_protect()
    scanner.close()


# --- the portable tracker -------------------------------------------------------------------------


@pytest.fixture
def ram():
    made = HostRam.create(16 * PAGE_BYTES)
    made.words[:8, 0] = np.arange(1, 9)
    yield made
    made.close()


def test_hash_tracker_compares_with_what_was_sent_and_else_with_the_start(ram):
    sent = np.zeros(16, np.uint64)
    log = DeviceLog()
    tracker = HashTracker(ram, sent, log)
    tracker.start()
    assert not tracker.harvest().any()
    ram.words[2, 5] = 1  # never sent: differs from the start
    ram.words[12, 0] = 1  # was a hole
    log.add(15 * PAGE_BYTES, 1)
    assert set_pages(tracker.harvest()) == [2, 12, 15]
    sent[2] = page_hashes(ram.pages_view[2])[0]
    assert set_pages(tracker.harvest()) == [12]
    ram.words[2, 5] = 0  # back to what it was at the start, but not to what was sent
    assert set_pages(tracker.harvest()) == [2, 12]
    tracker.stop()


def test_hash_tracker_wants_a_hash_per_page(ram):
    with pytest.raises(ValueError, match="3 hashes for 16 pages"):
        HashTracker(ram, np.zeros(3, np.uint64), DeviceLog())


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "reason", "hints", "chosen"),
    [
        ("auto", "", True, "uffd"),
        ("auto", "", False, "uffd"),
        ("auto", "no ioctl", False, "hash"),
        ("uffd", "", True, "uffd"),
        ("hash", "", False, "hash"),
        ("hash", "no ioctl", False, "hash"),
    ],
)
def test_the_choice_is_named_with_its_reason(requested, reason, hints, chosen):
    name, why = choose(requested, reason, hints=hints)
    assert name == chosen
    assert why
    assert reason in why or requested != "auto"


@pytest.mark.parametrize(
    ("requested", "reason", "hints"),
    [("auto", "no ioctl", True), ("uffd", "no ioctl", False), ("hash", "", True), ("hash", "no ioctl", True)],
)
def test_what_cannot_be_had_is_refused_in_one_line(requested, reason, hints):
    with pytest.raises(TrackerUnavailable) as caught:
        choose(requested, reason, hints=hints)
    assert "\n" not in caught.value.reason
    assert requested == "hash" or reason in caught.value.reason


def test_an_unknown_tracker_is_no_tracker():
    with pytest.raises(ValueError, match="auto, uffd or hash"):
        choose("soft-dirty", "", hints=False)


# --- the device's log -----------------------------------------------------------------------------


def test_the_log_names_every_page_a_store_touches_once():
    log = DeviceLog()
    log.add(PAGE_BYTES - 1, 2)
    log.add(PAGE_BYTES, 0)
    log.add_stores([(3 * PAGE_BYTES, PAGE_BYTES), (5 * PAGE_BYTES - 1, 1), (0, 0)])
    log.add_pages(np.array([9, 3, 9], np.uint64))
    assert log.take().tolist() == [0, 1, 3, 4, 9]
    assert log.take().tolist() == []


def test_a_log_that_nobody_takes_stays_bounded():
    log = DeviceLog()
    pages = np.arange(1000, dtype=np.uint64)
    for _ in range(3 * COMPACT_ABOVE // 1000):
        log.add_pages(pages)
        assert log._runs_entries <= COMPACT_ABOVE + 1000
    assert log.take().tolist() == pages.tolist()
