"""A guest agent as a real process, with the host's own balloon device and sideband link beside it, for tests."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from guest_agent.beats import BEAT_RECORD
from host.agent_link import AgentLink
from host.balloon_server import BalloonServer
from host.device_log import DeviceLog

MEMORY_BYTES = 96 << 20
PAGES = MEMORY_BYTES // 4096
WORKLOADS = [
    {"name": "freed", "fraction": 0.6, "keep": 0.1},
    {"name": "writer", "rate": "2000pages/s", "working_set": "4MiB", "pattern": "random"},
    {"name": "kv", "records": 2000, "operations_per_second": 2000},
]
# Hints are blocks of 4 MiB and leave the low watermark: in so small a guest that is several percent. The 95 % of
# a real guest are measured in benchmarks.
HINTED_SHARE = 0.9
USED, FREE, BALLOONED, HELD = range(4)


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        pause.wait(0.002)


@dataclass
class Host:
    """One guest agent process with a balloon device and a sideband link."""

    directory: Path
    name: str
    workloads: list[dict[str, Any]] | None
    batches: list[Any] = field(default_factory=list)
    news: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    memory_bytes: int = MEMORY_BYTES
    balloon: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("--die-with-parent",)

    def __post_init__(self) -> None:
        self.vhost = self.directory / f"{self.name}.vhost"
        self.socket = self.directory / f"{self.name}.agent"
        self.beats = self.directory / f"{self.name}.beats"
        self.oracle = self.directory / f"{self.name}.oracle"
        self.log = self.directory / f"{self.name}.log"

    def start_agent(self, **paths: Path) -> "Host":
        command = [sys.executable, "-m", "guest_agent", *self.arguments, "--seed", "7"]
        command += ["--name", self.name, f"--memory={self.memory_bytes}"]
        files = {
            "vhost-socket": self.vhost,
            "agent-socket": self.socket,
            "beats": self.beats,
            "oracle": self.oracle,
        }
        if self.workloads is None:
            command += ["--standby"]
        else:
            files["workloads"] = self.directory / f"{self.name}.json"
            files["workloads"].write_text(json.dumps({"workloads": self.workloads, "balloon": self.balloon}))
        for option, path in (files | paths).items():
            command += [f"--{option}", str(path)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        return self

    def start_node(self) -> "Host":
        self.device = BalloonServer(self.vhost, sink=self.batches.append, log=DeviceLog())
        self.device.start()
        return self.connect()

    def connect(self) -> "Host":
        self.link = AgentLink(self.socket, on_notify=lambda event, fields: self.news.append((event, fields)))
        self.link.connect(20)
        return self

    def stop_node(self) -> None:
        self.link.close()
        self.device.stop()

    def wait_ready(self) -> "Host":
        wait_until(
            lambda: (hello := self.link.hello()).ready and hello.balloon_ready and self.device.status().ready,
            "guest and balloon ready",
        )
        return self

    def close(self) -> None:
        if hasattr(self, "link"):
            self.link.close()
        if hasattr(self, "process"):
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
        if hasattr(self, "device"):
            self.device.stop()

    def hint(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """One whole report; the mask of hinted pages."""
        self.batches.clear()
        self.device.open_hints()
        wait_until(lambda: any(batch.stopped for batch in self.batches), "STOP of the report")
        self.device.close_hints()
        hinted = np.zeros(PAGES, bool)
        for batch in self.batches:
            for first, count in zip(batch.pfn_first.tolist(), batch.page_count.tolist(), strict=True):
                hinted[first : first + count] = True
        return hinted

    def beat_records(self) -> list[tuple[int, ...]]:
        data = self.beats.read_bytes()
        return list(BEAT_RECORD.iter_unpack(data[: len(data) // BEAT_RECORD.size * BEAT_RECORD.size]))

    def ram_digest(self) -> int:
        """Hash of all of guest RAM, holes read as zeros through the descriptor."""
        info = self.link.ram()
        try:
            digest = xxhash.xxh3_64()
            for offset in range(0, info.memory_bytes, 1 << 20):
                digest.update(os.pread(info.memfd, 1 << 20, offset))
            return digest.intdigest()
        finally:
            info.close()


@pytest.fixture(name="hosts")
def fixture_hosts(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(name: str, workloads: list[dict[str, Any]] | None, **more: Any) -> Host:
        made.append(Host(tmp_path, name, workloads, **more))
        return made[-1]

    yield make
    for host in reversed(made):
        host.close()


@pytest.fixture(name="guest")
def fixture_guest(hosts: Callable[..., Host]) -> Host:
    host: Host = hosts("a", WORKLOADS).start_agent().start_node().wait_ready()
    return host
