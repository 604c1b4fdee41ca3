"""What this node process costs: CPU seconds, and memory of its own beyond guest RAM.

Guest RAM is shared memory, so the node's own memory is anonymous plus file-backed resident pages
(proc(5), RssAnon and RssFile of /proc/self/status); the peak is sampled, since the kernel keeps a
high-water mark only for the sum with shared pages.
"""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import psutil

SAMPLE_PERIOD_S = 0.1  # one small file of /proc each time


def own_memory_bytes() -> int:
    """Resident anonymous and file-backed memory of this process now."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    )
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def available_memory_bytes() -> int:
    """MemAvailable of this machine."""
    return int(psutil.virtual_memory().available)


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class ResourceMeter:
    """Samples the node's own memory until stopped."""

    def __init__(self) -> None:
        self.own_memory_peak_bytes = own_memory_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resources", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_PERIOD_S):
            self.sample()

    def sample(self) -> None:
        """Take one sample now, at a point of interest."""
        self.own_memory_peak_bytes = max(self.own_memory_peak_bytes, own_memory_bytes())

    def fields(self) -> dict[str, float | int]:
        """For the event node_resources."""
        self.sample()
        return {"cpu_seconds": cpu_seconds(), "own_memory_peak_bytes": self.own_memory_peak_bytes}

    def stop(self) -> None:
        """End the sampling thread."""
        self._stop.set()
        self._thread.join()  # ends: within SAMPLE_PERIOD_S
