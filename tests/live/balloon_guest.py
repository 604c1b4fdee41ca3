"""A guest's balloon with its threads inside the test's own process, and the host's real device beside it."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guest_agent.balloon import Balloon
from guest_agent.balloon_options import BalloonOptions
from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.compaction import Compaction
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.front_end import FrontEnd
from guest_agent.gate import PauseGate
from guest_agent.ram import GuestRam
from guest_agent.ring_area import RingArea
from guest_agent.threads import GuestThread
from host.balloon_server import BalloonServer
from host.device_log import DeviceLog


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.002)


class Guest:
    """RAM, allocator and balloon with their threads; no workload but the test."""

    def __init__(self, path: Path, memory_bytes: int, *, memfd: int | None = None, **options: Any) -> None:
        """A new guest, or with `memfd` one that goes on in the memory of another (`balloon.restore` it)."""
        if memfd is None:
            self.ram = GuestRam.create(memory_bytes)
            boot = BootPage.format(self.ram)
        else:
            self.ram = GuestRam.adopt(memfd, memory_bytes)
            boot = BootPage.open(self.ram)
        self.frames = FrameTable(self.ram, boot)
        self.buddy = BuddyAllocator(self.ram, boot, self.frames)
        self.area = RingArea(boot.ring_address)
        self.gate = PauseGate()
        self.stopping = threading.Event()
        self.front_end = FrontEnd(path, self.ram, self.area.layouts, self.stopping)
        self.balloon = Balloon(
            self.ram,
            self.frames,
            self.buddy,
            self.area,
            front_end=self.front_end,
            gate=self.gate,
            options=BalloonOptions(**options),
        )
        self.compaction = Compaction(self.buddy, self.balloon.move_pages)
        self.buddy.compact = self.compaction.make_block
        self.failures: list[tuple[str, BaseException]] = []
        self.threads = [
            GuestThread(name, body, lambda name, error: self.failures.append((name, error)))
            for name, body in (("balloon", self.balloon.run), ("front_end", self.front_end.run))
        ]

    def start(self, *, connect: bool = True) -> None:
        self.gate.open()
        self.front_end.start_rings(None)
        for thread in self.threads if connect else self.threads[:1]:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.gate.shut()
        self.balloon.wake()
        self.front_end.wake()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(10)
                assert not thread.is_alive()
        self.balloon.close()
        self.front_end.close()
        self.ram.close()
        assert self.failures == []

    def take(self, pages: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """What a workload does."""
        with self.gate:
            return self.buddy.alloc_bulk(pages, kind=FrameKind.ANON, owner=1)


@pytest.fixture(name="guests")
def fixture_guests(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(memory_bytes: int, **options: Any) -> Guest:
        made.append(Guest(tmp_path / "vhost", memory_bytes, **options))
        return made[-1]

    yield make
    for guest in made:
        guest.stop()


@pytest.fixture(name="device")
def fixture_device(tmp_path: Path) -> Iterator[BalloonServer]:
    server = BalloonServer(tmp_path / "vhost", sink=lambda _: None, log=DeviceLog())
    server.start()
    yield server
    server.stop()
