"""The agent of a Linux guest: what its node may ask, answered by freezing, reading and thawing it.

Rule 1: the guest cannot go anywhere: its kernel's own image is outside its RAM. So there is no save, restore, run
        or freeze here, only a pause from which it goes on, at epoch 1 for ever.
Rule 2: a pause is the control group freezer's: whatever the guest was doing, it does not do it any more, and its
        rings stay as they are. Nobody can ask a frozen front-end for its ring bases; the device knows them.
Rule 3: the agent listens when the guest is up and its workloads are set up: who finds it finds a running guest.
Rule 4: all operations run on one thread, the one in `serve`.
"""

from __future__ import annotations

import json
import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from guest_agent.beats import BEAT_RECORD
from guest_agent.clock import host_now_ns
from guest_agent.control import ControlServer, Reply, Request
from guest_agent.errors import OperationRefused
from linux_guest.errors import FreezerUnavailableError
from linux_guest.frame_table import BALLOONED, FREE, HELD, PAGE_BYTES, FrameTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from linux_guest.freezer import FreezerGroup
    from linux_guest.ram_file import RamFile
    from linux_guest.uml import LinuxGuest
    from linux_guest.workloads import Workloads

PROTOCOL_VERSION: Final = 1
KIND: Final = "linux"
GUEST_EPOCH: Final = 1
RINGS: Final = 5
COUNTS_NS: Final = 250_000_000  # how old the page counts of `hello` may be: counting reads 64 bytes a page
NOT_TRACKED: Final = "a Linux guest writes through mappings of its own processes, which cannot be tracked"
REFUSED: Final = "a Linux guest cannot leave its host: its kernel is outside its RAM"


class State(StrEnum):
    """What the guest does."""

    RUNNING = "running"
    PAUSED = "paused"


class Beats:
    """Writes the guest's own clock down as it is heard: (when, epoch, count kept in the guest)."""

    def __init__(self, path: Path) -> None:
        self.heard = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __call__(self, beat: int) -> None:
        """One beat, now. Raises OSError."""
        self.heard = beat
        os.write(self._fd, BEAT_RECORD.pack(host_now_ns(), GUEST_EPOCH, beat))

    def close(self) -> None:
        """Close the file, after the guest ended."""
        os.close(self._fd)


class Agent:
    """Holds one running Linux guest, and listens from its construction on."""

    def __init__(
        self,
        socket_path: Path,
        *,
        guest: LinuxGuest,
        group: FreezerGroup,
        ram: RamFile,
        frames: FrameTable,
        workloads: Workloads,
        beats: Beats,
        markers_path: Path,
    ) -> None:
        self._guest = guest
        self._group = group
        self._ram = ram
        self._frame_table = frames
        self._workloads = workloads
        self._beats = beats
        self._markers_path = markers_path
        self._state = State.RUNNING
        self._ending = False
        self._counts = (0, 0, 0)
        self._counted_ns = 0
        self._log = structlog.get_logger(component="agent")
        self._control = ControlServer(socket_path, self._handle)
        self._handlers: dict[str, Callable[[Request], Reply]] = {
            "hello": self._hello,
            "ram": self._pass_ram,
            "pause": self._pause,
            "resume": self._resume,
            "frames": self._frames,
            "check": self._check,
            "shutdown": self._shutdown,
        }

    @property
    def wake_fd(self) -> int:
        """For `signal.set_wakeup_fd`."""
        return self._control.wake_write_fd

    def ask_to_end(self) -> None:
        """End in good order; from any thread or signal handler."""
        self._ending = True
        self._control.wake()

    def look(self) -> None:
        """Have the serving thread look whether the guest is alive; from any thread."""
        self._control.wake()

    def serve(self) -> bool:
        """Until it is asked to end, or the guest ends by itself; false then."""
        self._control.serve(lambda: not self._ending and self._guest.alive)
        return self._ending

    def close(self) -> None:
        """Listen no more."""
        self._control.close()

    # --- operations -------------------------------------------------------------------------------

    def _handle(self, request: Request) -> Reply:
        handler = self._handlers.get(request.op)
        if handler is None:
            raise OperationRefused(f"{request.op}: {REFUSED}")
        started = time.perf_counter()
        reply = handler(request)
        if request.op != "hello":
            took_ms = round((time.perf_counter() - started) * 1000, 3)
            self._log.info("operation", op=request.op, state=self._state.value, took_ms=took_ms)
        return reply

    def _hello(self, _: Request) -> Reply:
        free, ballooned, held = self._page_counts()
        return Reply(
            {
                "version": PROTOCOL_VERSION,
                "kind": KIND,
                "state": self._state.value,
                "guest_epoch": GUEST_EPOCH,
                "pages": self._ram.size // PAGE_BYTES,
                "free_pages": free,
                "ballooned_pages": ballooned,
                "held_pages": held,
                "balloon_ready": True,
                "operations": self._beats.heard,
                "workloads": {marker.name: {"operations": 0} for marker in self._workloads.alive},
                "balloon": {},
                "pid": os.getpid(),
                "ready": True,
                "cpu_seconds": time.process_time(),
            }
        )

    def _page_counts(self) -> tuple[int, int, int]:
        now_ns = host_now_ns()
        if now_ns - self._counted_ns > COUNTS_NS:
            counted = np.bincount(self._frame_table.kinds(), minlength=4)
            self._counts = (int(counted[FREE]), int(counted[BALLOONED]), int(counted[HELD]))
            self._counted_ns = now_ns
        return self._counts

    def _pass_ram(self, _: Request) -> Reply:
        fields: dict[str, Any] = {
            "base_address": self._guest.ram_mapping().base_address,
            "memory_bytes": self._ram.size,
            "write_protect": NOT_TRACKED,
        }
        return Reply(fields, fds=[self._ram.fd])

    def _pause(self, _: Request) -> Reply:
        if self._state is State.RUNNING:
            try:
                self._group.freeze()
            except FreezerUnavailableError as error:
                raise OperationRefused(str(error)) from error
            self._state = State.PAUSED
        return Reply({"paused_at_ns": host_now_ns(), "ring_bases": [0] * RINGS})

    def _resume(self, request: Request) -> Reply:
        if request.fields["guest_epoch"] != GUEST_EPOCH:
            raise OperationRefused(
                f"the guest is at epoch {GUEST_EPOCH}, not {request.fields['guest_epoch']}"
            )
        self._group.thaw()
        self._state = State.RUNNING
        return Reply()

    def _frames(self, _: Request) -> Reply:
        """The kinds of all pages, and on the side where the markers' pages were at this moment."""
        self._need_paused("frames")
        self._markers_path.write_text(json.dumps(self._workloads.evidence()), encoding="utf-8")
        memfd = os.memfd_create("ballast-frames", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(memfd), "wb") as file:
            file.write(self._frame_table.kinds().tobytes())
        return Reply(owned_fds=[memfd])

    def _check(self, _: Request) -> Reply:
        self._need_paused("check")
        right, problems = self._workloads.check()
        return Reply({"ok_items": right, "problems": problems[:100]})

    def _shutdown(self, _: Request) -> Reply:
        self._ending = True
        return Reply()

    def _need_paused(self, operation: str) -> None:
        if self._state is not State.PAUSED:
            raise OperationRefused(f"{operation} is not possible while the guest is {self._state}")
