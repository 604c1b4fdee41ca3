"""The guest's heartbeat: from its gaps the guest tells its own blackout.

Rule 1: one beat: the counter in guest RAM goes up by one, then one record goes to the beats file; one slice.
Rule 2: the file is append-only and unbuffered: what was beaten is there even if the process dies.
Rule 3: a late beat is not made up for; the schedule moves on from now.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from guest_agent.clock import host_now_ns

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from guest_agent.boot import BootPage
    from guest_agent.gate import PauseGate

__all__ = ["BEAT_PERIOD_NS", "BEAT_RECORD", "Beats"]

BEAT_PERIOD_NS = 2_000_000
BEAT_RECORD = struct.Struct("<QQQ")  # at_ns (CLOCK_MONOTONIC), guest_epoch, beat (counter kept in guest RAM)
assert BEAT_RECORD.size == 24


class Beats:
    """Writes a beat every 2 ms while the gate is open. `run` is the body of the beat thread."""

    def __init__(self, path: Path, boot: BootPage, gate: PauseGate, stopping: threading.Event) -> None:
        self._boot = boot
        self._gate = gate
        self._stopping = stopping
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def run(self) -> None:
        """Beat until the gate shuts.

        Raises:
            GateShut: the agent ends.
            OSError: the beats file cannot be written.
        """
        due_ns = host_now_ns()
        while not self._stopping.is_set():
            with self._gate:
                self.beat()
            now_ns = host_now_ns()
            due_ns = max(due_ns + BEAT_PERIOD_NS, now_ns)
            self._stopping.wait((due_ns - now_ns) / 1e9)

    def beat(self) -> None:
        """One beat, now."""
        boot = self._boot
        beat = boot.beats + 1
        boot.beats = beat
        written = os.write(self._fd, BEAT_RECORD.pack(host_now_ns(), boot.guest_epoch, beat))
        if written != BEAT_RECORD.size:
            raise OSError(f"beats file took {written} of {BEAT_RECORD.size} bytes")

    def close(self) -> None:
        """Close the file, after the thread ended."""
        os.close(self._fd)
