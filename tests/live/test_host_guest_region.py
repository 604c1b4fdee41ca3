"""Guest RAM as a front-end shares it: what is mapped, sealed, refused, and given back."""

import fcntl
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from host.guest_region import GuestRegion
from virtio.errors import VhostUserError
from virtio.page_ranges import PageRuns

PAGE = 4096


def memfd(pages, *, sealable=True):
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0))
    os.ftruncate(fd, pages * PAGE)
    return fd


def fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_region_that_begins_late_in_its_file_has_its_pages_from_there():
    """Linux UML: its kernel image comes first, and guest address == offset."""
    region = GuestRegion(memfd(16), 4 * PAGE, 12 * PAGE)
    assert (region.first_page, region.end_page, len(region.memory)) == (4, 16, 16 * PAGE)
    region.memory[5 * PAGE] = 7
    assert region.read(5 * PAGE, 2) == b"\x07\x00"
    region.close()


@pytest.mark.parametrize("sealable", [True, False])
def test_a_file_is_sealed_against_shrinking_or_watched(sealable):
    fd = memfd(16, sealable=sealable)
    other = os.dup(fd)
    region = GuestRegion(fd, 0, 16 * PAGE)
    assert region.sealed is sealable
    if sealable:
        with pytest.raises(PermissionError):
            os.ftruncate(other, PAGE)
    else:
        os.ftruncate(other, PAGE)
    assert region.still_whole() is sealable
    region.close()
    os.close(other)


def test_a_plain_file_serves_too(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(16 * PAGE))
    region = GuestRegion(os.open(path, os.O_RDWR), 0, 16 * PAGE)
    assert not region.sealed
    assert region.still_whole()
    region.close()


@pytest.mark.parametrize(
    ("address", "size"), [(0, 17 * PAGE), (PAGE, 16 * PAGE), (1, PAGE), (0, PAGE + 1), (0, 0), (0, 1 << 60)]
)
def test_a_region_that_cannot_be_is_refused_and_its_descriptor_closed(address, size):
    before = fds()
    with pytest.raises(VhostUserError, match="region"):
        GuestRegion(memfd(16), address, size)
    assert fds() == before


def test_a_huge_sparse_file_is_refused():
    """1 EiB would map, and a balloon could not name its pages."""
    before = fds()
    with pytest.raises(VhostUserError, match="region"):
        GuestRegion(memfd(1 << 40), 0, PAGE << 40)
    assert fds() == before


def test_a_descriptor_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "ram").write_bytes(bytes(PAGE))
    before = fds()
    with pytest.raises(VhostUserError, match="cannot be mapped"):
        GuestRegion(os.open(tmp_path / "ram", os.O_RDONLY), 0, PAGE)
    assert fds() == before


def no_memory(kind, tmp_path):
    """Descriptors that are not guest RAM, of 16 pages where they have a size at all."""
    if kind.startswith("sealed"):
        fd = memfd(16)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        return fd
    if kind == "a path only":
        (tmp_path / "ram").write_bytes(bytes(16 * PAGE))
        return os.open(tmp_path / "ram", os.O_PATH)
    if kind == "a pipe":
        reader, writer = os.pipe()
        os.close(writer)
        return reader
    if kind == "a socket":
        return socket.socket(socket.AF_UNIX).detach()
    places = {"a directory": tmp_path, "a device of zeros": "/dev/zero", "a file of /proc": "/proc/self/mem"}
    if kind in places:
        return os.open(places[kind], os.O_RDONLY if kind == "a directory" else os.O_RDWR)
    return {"an event": lambda: os.eventfd(0)}[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        "sealed against writing", "a path only", "a pipe", "a socket", "a directory", "a device of zeros",
        "a file of /proc", "an event",
    ],
)  # fmt: skip
def test_a_descriptor_of_another_kind_is_refused_and_closed(tmp_path, kind):
    before = fds()
    with pytest.raises(VhostUserError, match="region"):
        GuestRegion(no_memory(kind, tmp_path), 0, 16 * PAGE)
    assert fds() == before


@pytest.mark.parametrize(("seal", "kept"), [(fcntl.F_SEAL_SHRINK, True), (fcntl.F_SEAL_SEAL, False)])
def test_memory_that_was_sealed_by_its_owner_is_served_as_what_it_is(seal, kept):
    fd = memfd(16)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    region = GuestRegion(fd, 0, 16 * PAGE)
    assert region.sealed is kept
    region.close()


def test_punched_runs_read_as_zero_and_the_rest_stays():
    region = GuestRegion(memfd(16), 0, 16 * PAGE)
    region.memory[:] = b"\xaa" * (16 * PAGE)
    assert region.punch(PageRuns(np.array([2, 9], np.uint64), np.array([3, 1], np.uint64))) == 0
    zero = [pfn for pfn in range(16) if region.memory[pfn * PAGE] == 0]
    assert zero == [2, 3, 4, 9]
    region.close()
