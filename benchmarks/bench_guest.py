"""One guest agent process with the host's own balloon device beside it, as a node has them, and what they spend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guest_agent.boot import MemoryLayout
from host.agent_link import AgentLink
from host.balloon_server import BalloonServer
from host.device_log import DeviceLog
from host.guest_region import GuestRegion
from virtio.balloon_device import BalloonDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.balloon_queues import HintBatch
    from virtio.page_ranges import PageRuns

PAGE_BYTES = 4096
LOOK_S = 0.001
POPULATE_BYTES = 4 << 20
PATIENCE_S = 120.0


@dataclass
class DeviceSpend:
    """What the device in this process did, since `reset`.

    Attributes:
        seconds: by step: "translate" (chains to page runs), "release" (punching).
        runs: (first page, pages) of every run that was punched.
        reports: (time, pages) of every pass over the reporting queue.
    """

    seconds: Counter[str] = field(default_factory=Counter)
    runs: list[tuple[int, int]] = field(default_factory=list)
    reports: list[tuple[float, int]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget what was."""
        self.seconds.clear()
        self.runs.clear()
        self.reports.clear()

    def watch(self) -> None:
        """Take the time of the device's steps, for the life of this process."""
        process_inflate, punch = BalloonDevice.process_inflate, GuestRegion.punch
        process_report = BalloonDevice.process_report

        def timed_inflate(device: BalloonDevice, *arguments: Any) -> PageRuns:
            started = time.perf_counter()
            pages = process_inflate(device, *arguments)
            self.seconds["translate"] += time.perf_counter() - started
            return pages

        def timed_punch(region: GuestRegion, pages: PageRuns) -> int:
            self.runs += zip(pages.first.tolist(), pages.count.tolist(), strict=True)
            started = time.perf_counter()
            failed = punch(region, pages)
            self.seconds["release"] += time.perf_counter() - started
            return failed

        def timed_report(device: BalloonDevice, *arguments: Any) -> PageRuns:
            pages = process_report(device, *arguments)
            self.reports.append((time.perf_counter(), pages.pages))
            return pages

        BalloonDevice.process_inflate = timed_inflate  # type: ignore[method-assign]
        BalloonDevice.process_report = timed_report  # type: ignore[method-assign]
        GuestRegion.punch = timed_punch  # type: ignore[method-assign]


@dataclass
class BenchGuest:
    """A guest that is up and has its balloon."""

    link: AgentLink
    device: BalloonServer
    batches: list[HintBatch]
    memory_bytes: int

    def balloon(self, pages: int) -> float:
        """Set the target; milliseconds until the device knows that the driver reached it."""
        started = time.perf_counter()
        self.device.set_num_pages(pages)
        wait_for(lambda: self.device.status().actual == pages, f"a balloon of {pages} pages")
        return (time.perf_counter() - started) * 1000

    def make_resident(self) -> None:
        """Give every page behind the guest kernel's own storage at the host; the guest must be idle."""
        chunk = b"\x5a" * POPULATE_BYTES
        ram = self.link.ram()
        try:
            position = MemoryLayout.for_pages(self.memory_bytes // PAGE_BYTES).reserved_pages * PAGE_BYTES
            while position < self.memory_bytes:
                position += os.pwrite(ram.memfd, chunk[: self.memory_bytes - position], position)
        finally:
            ram.close()

    def hint(self) -> tuple[float, int]:
        """One report: (milliseconds from asking to the guest's STOP, pages hinted)."""
        self.batches.clear()
        started = time.perf_counter()
        self.device.open_hints()
        wait_for(lambda: any(batch.stopped for batch in self.batches), "the end of the report")
        took_ms = (time.perf_counter() - started) * 1000
        self.device.close_hints()
        self.device.hints_done()
        return took_ms, sum(int(batch.page_count.sum()) for batch in self.batches)


def wait_for(true: Callable[[], bool], what: str) -> None:
    """Look every millisecond."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not true():
        if time.monotonic() > deadline:
            sys.exit(f"not within {PATIENCE_S:g} s: {what}")
        pause.wait(LOOK_S)


@contextmanager
def running_guest(memory_bytes: int, workloads: list[dict[str, Any]], **balloon: Any) -> Iterator[BenchGuest]:
    """A guest from its boot to its end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ballast-bench-")))
        (folder / "guest.json").write_text(json.dumps({"workloads": workloads, "balloon": balloon}))
        batches: list[HintBatch] = []
        device = BalloonServer(folder / "vhost", sink=batches.append, log=DeviceLog())
        device.start()
        stack.callback(device.stop)
        files = {"vhost-socket": "vhost", "agent-socket": "agent", "beats": "beats", "oracle": "oracle"}
        files["workloads"] = "guest.json"
        command = [sys.executable, "-m", "guest_agent", "--name", "bench", "--seed", "1", "--die-with-parent"]
        command += [f"--memory={memory_bytes}"]
        command += [f"--{option}={folder / name}" for option, name in files.items()]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        link = AgentLink(folder / "agent", on_notify=lambda *_: None)
        stack.callback(link.close)
        link.connect(20)
        wait_for(lambda: (hello := link.hello()).ready and hello.balloon_ready, "the guest")
        wait_for(lambda: device.status().ready, "its balloon")
        yield BenchGuest(link, device, batches, memory_bytes)
