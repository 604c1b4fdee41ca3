"""The parts of a Linux guest that need no Linux guest: archive, frame table, markers, workloads, programs."""

import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest

from linux_guest import cpio, packages, workloads
from linux_guest.errors import FrameTableError, PackagesMissingError, WorkloadError
from linux_guest.frame_table import (
    BALLOONED,
    BUDDY_BIT,
    FREE,
    HELD,
    HINT_BLOCK_PAGES,
    NO_TYPE,
    OFFLINE_BIT,
    USED,
    FrameTable,
    Layout,
)
from linux_guest.marker import FIRST_NUMBER, NUMBER_AT, Marker
from linux_guest.ram_file import RamFile

PAGE_BYTES = 4096


def unpacked(archive):
    """A reader of "newc" of our own: {name: (mode, content)} up to the trailer."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        start = at + -(-(110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size])
        at = start + -(-size // 4) * 4


def test_an_archive_holds_what_was_put_in_and_is_the_same_each_time():
    entries = [
        cpio.directory("bin"),
        cpio.program("bin/a", b"12345"),
        cpio.link("bin/b", "a"),
        cpio.character_device("dev/console", 5, 1),
        cpio.program("empty", b""),
    ]
    archive = cpio.archive(entries)
    assert archive == cpio.archive(entries)
    found = unpacked(archive)
    assert list(found) == ["bin", "bin/a", "bin/b", "dev/console", "empty"]
    assert found["bin/a"][1] == b"12345"
    assert found["bin/b"][1] == b"a"
    assert stat.S_ISDIR(found["bin"][0])
    assert stat.S_ISLNK(found["bin/b"][0])
    assert stat.S_ISCHR(found["dev/console"][0])
    assert found["bin/a"][0] & 0o111


@pytest.fixture(name="ram")
def fixture_ram():
    made = []

    def make(pages):
        fd = os.memfd_create("ram")
        os.ftruncate(fd, pages * PAGE_BYTES)
        made.append(RamFile(fd))
        return made[-1]

    yield make
    for ram in made:
        ram.close()


class Kernel:
    """RAM with a frame table as Linux 6.1 lays it out: 64 bytes a frame, from page 16 on."""

    BASE = 0x6000_0000
    PAGES = 8 * HINT_BLOCK_PAGES
    TABLE = 16 * PAGE_BYTES
    LIST_HEAD = 8 * PAGE_BYTES
    LAYOUT = Layout(BASE + TABLE, 64, 0, 8, 40, 48, 52, excluded_flags=1 << 4 | 1 << 9)

    def __init__(self, ram):
        self.ram = ram
        self.frames = FrameTable(ram, self.LAYOUT, self.BASE)
        for pfn in range(self.PAGES):
            self.set(pfn, 48, "<I", NO_TYPE)
            self.set(pfn, 52, "<I", 1)

    def set(self, pfn, offset, form, value):
        os.pwrite(self.ram.fd, struct.pack(form, value), self.TABLE + 64 * pfn + offset)

    def free(self, pfn, order):
        self.set(pfn, 48, "<I", NO_TYPE & ~BUDDY_BIT)
        self.set(pfn, 40, "<Q", order)

    def node(self, block):
        return self.BASE + self.TABLE + 64 * block * HINT_BLOCK_PAGES + 8

    def hold(self, blocks):
        """Allocate these blocks and link them into the driver's list."""
        head = self.BASE + self.LIST_HEAD
        ring = [head, *(self.node(block) for block in blocks)]
        for i, block in enumerate(blocks, 1):
            for pfn in range(block * HINT_BLOCK_PAGES + 1, (block + 1) * HINT_BLOCK_PAGES):
                self.set(pfn, 52, "<I", 0)
            self.set(block * HINT_BLOCK_PAGES, 8, "<Q", ring[(i + 1) % len(ring)])
            self.set(block * HINT_BLOCK_PAGES, 16, "<Q", ring[i - 1])
        os.pwrite(self.ram.fd, struct.pack("<QQ", ring[1 % len(ring)], ring[-1]), self.LIST_HEAD)


@pytest.fixture(name="kernel", scope="module")
def fixture_kernel():
    fd = os.memfd_create("ram")
    os.ftruncate(fd, Kernel.PAGES * PAGE_BYTES)
    ram = RamFile(fd)
    kernel = Kernel(ram)
    kernel.free(4 * HINT_BLOCK_PAGES, 10)
    kernel.free(3 * HINT_BLOCK_PAGES + 8, 3)
    kernel.set(77, 48, "<I", NO_TYPE & ~OFFLINE_BIT)
    kernel.hold([5, 7, 6])
    yield kernel
    ram.close()


def test_the_frame_table_says_what_the_kernel_wrote(kernel):
    kinds = kernel.frames.kinds()
    expected = np.full(Kernel.PAGES, USED, np.uint8)
    expected[4 * HINT_BLOCK_PAGES : 5 * HINT_BLOCK_PAGES] = FREE
    expected[3 * HINT_BLOCK_PAGES + 8 : 3 * HINT_BLOCK_PAGES + 16] = FREE
    expected[77] = BALLOONED
    expected[5 * HINT_BLOCK_PAGES :] = HELD
    assert (kinds == expected).all()


@pytest.mark.parametrize(
    ("offset", "form", "value"),
    [
        (52, "<I", 2),  # somebody else has a reference
        (0, "<Q", 1 << 4),  # the page cache's
        (0, "<Q", 1 << 9),  # a slab
        (8, "<Q", 0xDEAD),  # its links lead nowhere
        (16, "<Q", 0xDEAD),  # its neighbour does not point back
    ],
    ids=["reference", "cache", "slab", "next", "previous"],
)
def test_a_block_that_is_not_certainly_held_is_in_use(ram, offset, form, value):
    kernel = Kernel(ram(Kernel.PAGES))
    kernel.hold([5])
    first = 5 * HINT_BLOCK_PAGES
    assert (kernel.frames.kinds()[first : first + HINT_BLOCK_PAGES] == HELD).all()
    if offset == 16:
        os.pwrite(kernel.ram.fd, struct.pack("<QQ", 0, value), Kernel.LIST_HEAD)
    else:
        kernel.set(first, offset, form, value)
    assert (kernel.frames.kinds()[first : first + HINT_BLOCK_PAGES] == USED).all()


def test_a_frame_table_that_makes_no_sense_is_refused(ram):
    kernel = Kernel(ram(Kernel.PAGES))
    kernel.free(0, 11)
    with pytest.raises(FrameTableError, match="order 11"):
        kernel.frames.kinds()


@pytest.fixture(name="marker")
def fixture_marker(ram):
    """Three pages of a marker at frames 5, 9 and 2, where its allocator put 16 bytes before the content."""
    memory = ram(64)
    marker = Marker(None, memory, 3)
    marker._shift = PAGE_BYTES - 16
    marker.pfns = np.array([5, 9, 2], np.uint64)
    for index, pfn in enumerate(marker.pfns.tolist()):
        os.pwrite(memory.fd, marker.content(index), pfn * PAGE_BYTES)
    return marker


def test_every_page_of_a_marker_has_a_content_of_its_own(marker):
    stream = b"".join(b"%0*d\n" % (PAGE_BYTES - 1, FIRST_NUMBER + line) for line in range(5))
    assert b"".join(marker.content(i) for i in range(3)) == stream[PAGE_BYTES - 16 :][: 3 * PAGE_BYTES]
    assert len({marker.content(i) for i in range(3)}) == 3
    assert NUMBER_AT == PAGE_BYTES - 16
    assert marker.problems() == []


def test_a_page_that_moved_is_found_again_and_a_page_that_is_lost_is_not(marker):
    ram = marker._ram
    os.pwrite(ram.fd, marker.content(1), 40 * PAGE_BYTES)
    os.pwrite(ram.fd, bytes(PAGE_BYTES), 9 * PAGE_BYTES)
    assert marker.problems() == [9]
    assert marker.find_again() == []
    assert marker.pfns.tolist() == [5, 40, 2]
    os.pwrite(ram.fd, b"x", 2 * PAGE_BYTES + 100)
    assert marker.find_again() == [2]
    assert marker.problems() == [2]


@pytest.mark.parametrize("chosen", [[{"name": "kv"}], [{"name": "marker", "size": 1, "colour": "red"}], [{}]])
def test_what_a_linux_guest_cannot_do_is_refused(chosen):
    with pytest.raises(WorkloadError):
        workloads.check_options(chosen)


def test_missing_programs_are_named_by_their_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "MODULES", tmp_path)
    with pytest.raises(PackagesMissingError) as caught:
        packages.find()
    assert caught.value.packages == ("user-mode-linux", "busybox-static")
    assert "apt-get install user-mode-linux busybox-static" in packages.missing()


def test_a_busybox_that_needs_libraries_does_not_serve(monkeypatch, tmp_path):
    program = tmp_path / "busybox"
    program.write_bytes(b"\x7fELF" + bytes(100) + b"/lib64/ld-linux-x86-64.so.2")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert packages._static_busybox() is None
    program.write_bytes(b"\x7fELF" + bytes(5000))
    assert packages._static_busybox() == program


@pytest.mark.parametrize(
    ("version", "flags", "loses"),
    [((6, 1), "fpu amx_tile", True), ((6, 13), "fpu amx_tile", False), ((6, 1), "fpu avx2", False)],
)
def test_only_an_old_kernel_on_a_processor_with_amx_loses_state(monkeypatch, version, flags, loses):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags\t\t: {flags}\n")
    programs = packages.Programs(Path("k"), Path("b"), Path("m"), version)
    assert programs.loses_xstate is loses
