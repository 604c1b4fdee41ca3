"""A stock Linux guest on our own balloon device, for tests: what the device says beside what the guest says."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from host.balloon_server import BalloonServer
from host.device_log import DeviceLog
from host.hint_batch import HintBatch
from linux_guest import probe
from linux_guest.frame_table import FrameTable
from linux_guest.marker import Marker
from linux_guest.ram_file import RamFile
from linux_guest.uml import LinuxGuest
from virtio.balloon_device import FEATURES_DEFAULT

PAGE_BYTES = 4096
WAIT_S = 20.0
LACKS = probe.programs() or probe.namespace()
needs_linux = [pytest.mark.interop, pytest.mark.skipif(bool(LACKS), reason=LACKS or "nothing is missing")]


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.005)


class StockGuest:
    """`device` and `linux` are connected, the driver is loaded; `ram` and `frames` look into the guest."""

    def __init__(self, device: BalloonServer, log: DeviceLog, linux: LinuxGuest, stack: ExitStack) -> None:
        self.device = device
        self.log = log
        self.linux = linux
        self.batches: list[HintBatch] = []
        self.ram = RamFile(linux.open_ram())
        stack.callback(self.ram.close)
        self.frames = FrameTable.of(linux, self.ram)
        self.pages = self.ram.size // PAGE_BYTES

    def load(self, options: str = "") -> None:
        self.linux.load_balloon(options)
        wait_until(lambda: self.device.status().ready, "the driver is up")

    def kinds(self) -> np.ndarray:
        return self.frames.kinds()

    def balloon(self, num_pages: int) -> None:
        """Inflate or deflate to this size."""
        self.device.set_num_pages(num_pages)
        wait_until(lambda: self.device.status().actual == num_pages, f"a balloon of {num_pages} pages")

    def report(self) -> int:
        """Ask for hints and wait for the end of the report; the command id. The report stays open."""
        self.batches.clear()
        command_id = self.device.open_hints()
        wait_until(lambda: any(batch.stopped for batch in list(self.batches)), "the guest's STOP")
        return command_id

    def hinted(self) -> np.ndarray:
        """Mask of the pages that were hinted for the newest id."""
        mask = np.zeros(self.pages, bool)
        for batch in list(self.batches):
            for first, count in zip(batch.pfn_first.tolist(), batch.page_count.tolist(), strict=True):
                mask[first : first + count] = True
        return mask

    def end_report(self) -> None:
        """Close, tell DONE, and wait until the guest has its memory back."""
        self.device.close_hints()
        self.device.hints_done()
        wait_until(lambda: not (self.kinds() == 3).any(), "the guest lets go of what it held")

    def marker(self, pages: int, name: str = "marker") -> Marker:
        marker = Marker(self.linux, self.ram, pages, name)
        marker.start()
        return marker

    def free_bytes(self) -> int:
        return self.linux.meminfo()["MemFree"]


@contextmanager
def stock_guest(
    directory: Path,
    *,
    memory_bytes: int,
    features: int = FEATURES_DEFAULT,
    parameters: tuple[str, ...] = (),
    load: bool = True,
) -> Iterator[StockGuest]:
    with ExitStack() as stack:
        log = DeviceLog()
        batches: list[HintBatch] = []
        device = BalloonServer(directory / "b.vhost", sink=batches.append, log=log, features_offered=features)
        device.start()
        stack.callback(device.stop)
        linux = stack.enter_context(
            LinuxGuest(
                directory,
                memory_bytes=memory_bytes,
                vhost_socket=directory / "b.vhost",
                parameters=parameters,
            )
        )
        guest = StockGuest(device, log, linux, stack)
        guest.batches = batches
        if load:
            guest.load()
        yield guest
