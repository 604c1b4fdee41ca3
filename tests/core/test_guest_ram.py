"""Guest RAM and the boot page: what is mapped, what is registered, and which images are refused."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from guest_agent import uffd
from guest_agent.boot import BOOT_RECORD, BootPage, MemoryLayout, free_map_blocks
from guest_agent.buddy import BuddyAllocator
from guest_agent.errors import RestoreError
from guest_agent.frames import FrameTable
from guest_agent.ram import GuestRam
from host.pagemap import WriteScanner

MIB = 1 << 20


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    ram = GuestRam.create(8 * MIB)
    yield ram
    ram.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def booted(ram: GuestRam) -> BootPage:
    boot = BootPage.format(ram)
    BuddyAllocator(ram, boot, FrameTable(ram, boot))
    return boot


def test_all_views_are_the_same_memory_and_start_as_zeros(ram: GuestRam) -> None:
    assert ram.pages == 2048
    assert (ram.words.shape, ram.bytes.shape, len(ram.memory)) == ((2048, 512), (2048, 4096), 8 * MIB)
    assert not ram.words.any()
    ram.words[3, 1] = 0x0102
    assert ram.bytes[3, 8] == 2
    assert ram.memory[3 * 4096 + 9] == 1
    assert os.pread(ram.fd, 2, 3 * 4096 + 8) == b"\x02\x01"
    assert ram.base_address == ram.words.ctypes.data


@pytest.mark.parametrize("memory_bytes", [0, -4096, 4095, 4097, 1 << 45])
def test_impossible_sizes_are_refused(memory_bytes: int) -> None:
    with pytest.raises(ValueError, match="guest memory"):
        GuestRam.create(memory_bytes)


def test_size_of_the_memory_file_is_sealed(ram: GuestRam) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(ram.fd, 4096)


def test_an_image_of_another_size_is_not_adopted_and_stays_the_callers() -> None:
    fd = os.memfd_create("image")
    os.ftruncate(fd, MIB)
    with pytest.raises(RestoreError, match="1048576 bytes"):
        GuestRam.adopt(fd, 2 * MIB)
    os.close(fd)


def test_adopting_maps_the_given_image() -> None:
    fd = os.memfd_create("image")
    os.ftruncate(fd, MIB)
    os.pwrite(fd, b"hello", 4096)
    ram = GuestRam.adopt(fd, MIB)
    assert bytes(ram.memory[4096:4101]) == b"hello"
    ram.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_closing_twice_is_closing_and_live_views_keep_the_memory(ram: GuestRam) -> None:
    words = ram.words
    ram.close()
    ram.close()
    words[5] = 7
    assert words[5, 0] == 7
    assert ram.words.size == 0


def test_protection_is_granted_or_refused_with_a_reason(ram: GuestRam) -> None:
    answer = ram.protect()
    assert (answer.pagemap_fd is None) == bool(answer.reason)
    assert ram.protect() is answer


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("open_userfaultfd", "userfaultfd cannot be opened"),
        ("enable_async_write_protect", "no asynchronous write protection"),
        ("register_write_protect", "cannot be registered"),
        ("probe_pagemap_scan", "no PAGEMAP_SCAN"),
    ],
)
def test_each_missing_kernel_feature_is_named(
    ram: GuestRam, monkeypatch: pytest.MonkeyPatch, step: str, reason: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    if step != "open_userfaultfd":
        monkeypatch.setattr(uffd, "open_userfaultfd", lambda: os.open("/dev/null", os.O_RDONLY))
        for other in ("enable_async_write_protect", "register_write_protect", "probe_pagemap_scan"):
            monkeypatch.setattr(uffd, other, lambda *_: None)
    monkeypatch.setattr(uffd, step, refused)
    before = descriptors()
    answer = ram.protect()
    assert answer.pagemap_fd is None
    assert reason in answer.reason
    assert "Invalid argument" in answer.reason
    assert descriptors() == before


@pytest.mark.parametrize("pages", [300, 1024, 2048, 4097, 65_536, 2_097_152])
def test_the_parts_of_the_layout_do_not_overlap(pages: int) -> None:
    layout = MemoryLayout.for_pages(pages)
    parts = [(0, 4096), (4096, 64 * 4096), (layout.kind_offset, pages), (layout.owner_offset, 2 * pages)]
    parts.append((layout.index_offset, 4 * pages))
    parts += [(layout.free_map_offset_of(order), free_map_blocks(pages, order)) for order in range(11)]
    parts.append((layout.pageblock_offset, free_map_blocks(pages, 10)))
    for (offset, size), (following, _) in pairwise(parts):
        assert offset + size <= following
        assert following % 4096 == 0
    assert parts[-1][0] + parts[-1][1] <= layout.reserved_pages * 4096


def test_a_guest_without_room_for_its_tables_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        MemoryLayout.for_pages(70)


def test_epoch_and_beats_are_in_ram(ram: GuestRam) -> None:
    boot = booted(ram)
    assert (boot.guest_epoch, boot.beats) == (1, 0)
    boot.guest_epoch = 2
    boot.beats = 99
    again = BootPage.open(ram)
    assert (again.guest_epoch, again.beats) == (2, 99)
    assert (again.ring_pfn, again.ring_pages, again.ring_address) == (1, 64, 4096)


def test_an_empty_image_is_refused(ram: GuestRam) -> None:
    with pytest.raises(RestoreError, match="no guest"):
        BootPage.open(ram)


def test_an_image_that_never_booted_is_refused(ram: GuestRam) -> None:
    BootPage.format(ram)
    with pytest.raises(RestoreError, match="never booted"):
        BootPage.open(ram)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("version", 2, "version 2"), ("pages", 1, "laid out"), ("index_offset", 0, "laid out")],
)
def test_an_image_that_says_something_else_is_refused(
    ram: GuestRam, field: str, value: int, reason: str
) -> None:
    booted(ram)
    ram.bytes[0, : BOOT_RECORD.itemsize].view(BOOT_RECORD)[field] = value
    with pytest.raises(RestoreError, match=reason):
        BootPage.open(ram)


def test_a_copy_of_ram_is_the_same_guest(ram: GuestRam) -> None:
    booted(ram).beats = 5
    copy = GuestRam.create(ram.memory_bytes)
    copy.words[:] = ram.words
    assert BootPage.open(copy).beats == 5
    assert np.array_equal(copy.words, ram.words)
    copy.close()


def test_what_anybody_may_open_tracks_also_what_the_kernel_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without privilege there is only a userfaultfd for user-mode faults; read(2) into RAM is the kernel's."""
    monkeypatch.setattr(uffd, "USERFAULTFD_DEVICE", "/dev/no-such-device")
    ram = GuestRam.create(64 * 4096)
    protected = ram.protect()
    assert protected.reason == ""
    assert protected.pagemap_fd is not None
    scanner = WriteScanner(os.dup(protected.pagemap_fd), ram.base_address, ram.pages)
    scanner.scan_and_protect()
    reader, writer = os.pipe()
    os.write(writer, bytes(range(256)) * 16)
    os.readv(reader, [ram.memory[7 * 4096 : 8 * 4096]])  # never touched before: an unpopulated page
    ram.words[9, 0] = 1
    assert np.flatnonzero(scanner.scan_and_protect()).tolist() == [7, 9]
    os.write(writer, bytes(4096))
    os.readv(reader, [ram.memory[7 * 4096 : 8 * 4096]])  # populated and write-protected
    assert np.flatnonzero(scanner.scan_and_protect()).tolist() == [7]
    os.close(reader)
    os.close(writer)
    scanner.close()
    ram.close()
