"""The balloon driver's hands: pages, rings and a thread for what virtio's BalloonDriver decides.

Rule 1: the driver decides, these hands execute, under one lock and in bounded turns inside the gate.
Rule 2: locks are taken in one order: balloon, then front-end or allocator. The front-end's callbacks take none.
Rule 3: pages are taken without pressure hooks: a balloon never makes the guest reclaim, and never squeezes itself.
Rule 4: a deflated page is free when the device acknowledged, never before (MUST_TELL_HOST).
Rule 5: when memory is out, the thread that needs it deflates by itself and waits, boundedly, for the device.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from guest_agent.errors import RestoreError
from guest_agent.frames import OWNER_BALLOON, FrameKind
from guest_agent.hint_report import ROOM_WAIT_S_MAX, HintReport
from guest_agent.pfn_arrays import PfnArrays
from guest_agent.pressure import PRESSURE_BALLOON, PRESSURE_HELD
from guest_agent.ring_area import ARRAY_SLOTS
from virtio.balloon import CMD_ID_DONE, CMD_ID_STOP, PFN_ARRAY_MAX, QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE
from virtio.balloon_driver import (
    BalloonDriver,
    ConfigChanged,
    DeflatePfns,
    InflatePfns,
    OutOfMemory,
    ReleaseHeld,
    ReportEnded,
    Retry,
    StartReport,
    StopReport,
    Submitted,
    UsedBuffers,
    WriteActual,
)
from virtio.errors import RemoteProtocolError, VhostUserError
from virtio.split_ring import DriverRing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_agent.buddy import BuddyAllocator
    from guest_agent.frames import FrameTable
    from guest_agent.front_end import FrontEnd
    from guest_agent.gate import PauseGate
    from guest_agent.ram import GuestRam
    from guest_agent.ring_area import RingArea
    from virtio.balloon import BalloonConfig
    from virtio.balloon_driver import DriverCommand, DriverEvent

__all__ = ["Balloon"]

BATCH_PAGES = ARRAY_SLOTS * PFN_ARRAY_MAX  # one operation fills all buffers of its queue
RETRY_S = 0.2  # as Linux waits when it found no page for its balloon
RETRY_SPARE_PAGES = 2 * BATCH_PAGES  # and only when there is plenty again: no tug-of-war with the guest
OOM_WAIT_S_MAX = 0.05  # the device answers in fractions of a millisecond, unless it is gone


class Balloon:
    """One balloon. `run` is the body of its thread; hooks are called by whichever thread allocates."""

    def __init__(
        self,
        ram: GuestRam,
        frames: FrameTable,
        buddy: BuddyAllocator,
        area: RingArea,
        *,
        front_end: FrontEnd,
        gate: PauseGate,
    ) -> None:
        self._frames = frames
        self._buddy = buddy
        self._front_end = front_end
        self._gate = gate
        self._lock = threading.RLock()
        self._driver = BalloonDriver(batch_pages=BATCH_PAGES)
        self._rings = [DriverRing(ram.memory, layout) for layout in area.layouts]
        kicks = [partial(front_end.kick, queue) for queue in range(len(self._rings))]
        self._inflate, self._deflate = (
            PfnArrays(queue, self._rings[queue], area, ram.memory, kicks[queue])
            for queue in (QUEUE_INFLATE, QUEUE_DEFLATE)
        )
        self._report = HintReport(
            ring=self._rings[QUEUE_HINT],
            area=area,
            memory=ram.memory,
            frames=frames,
            buddy=buddy,
            kick=kicks[QUEUE_HINT],
        )
        self._config: BalloonConfig | None = None  # read and not yet handled
        self._first_config = False  # the next one is the first of a newly connected device
        self._forget_command_id = False  # that device never issued the id reported last
        self._actual_to_write: int | None = None
        self._report_moved_at = 0.0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        buddy.add_pressure_hook(PRESSURE_HELD, self._report.give_back)
        buddy.add_pressure_hook(PRESSURE_BALLOON, self._deflate_for_memory)
        front_end.attach(self)

    @property
    def ballooned_pages(self) -> int:
        """Pages in the balloon, in flight or not."""
        return int(np.count_nonzero(self._frames.kind == FrameKind.BALLOON))

    @property
    def held_pages(self) -> int:
        """Pages hinted and held until DONE."""
        return self._report.held_pages

    @property
    def reporting(self) -> bool:
        """Whether a hint report is under way."""
        return self._report.is_open

    @property
    def config_handled(self) -> bool:
        """Whether the newest configuration was looked at."""
        with self._lock:
            return self._config is None

    @property
    def features(self) -> int:
        """What the driver and its device agreed on."""
        return self._driver.features

    # --- the front-end's callbacks: no locks (rule 2) ---

    def negotiate(self, offered: int) -> int:
        """Pick features; once picked, a later device must offer them all. Raises RemoteProtocolError."""
        self._first_config = True
        agreed = self._driver.features
        if not agreed:
            return self._driver.negotiate(offered)
        if agreed & ~offered:
            raise VhostUserError("features", f"the guest uses {agreed:#x}, the new device has {offered:#x}")
        return agreed

    def config_changed(self, config: BalloonConfig) -> None:
        """Take note of the configuration; only the newest counts, as for a driver that reads registers.

        A device that shows no id when it connects has no report open. If it started anew it may issue ids from
        the beginning again: the id reported last, by which a driver knows what it reported already, is void.
        """
        if self._first_config and config.free_page_hint_cmd_id in (CMD_ID_STOP, CMD_ID_DONE):
            self._forget_command_id = True
        self._first_config = False
        self._config = config
        self.wake()

    def device_bases(self) -> list[int]:
        """Where the rings stand by their used indices."""
        return [ring.device_base for ring in self._rings]

    # --- the thread ---

    def run(self) -> None:
        """Do what is to be done, then wait for the device or the front-end.

        Raises:
            GateShut: the agent ends.
            DeviceProtocolError: the device gave back buffers that it did not have.
        """
        waiting = select.poll()
        for fd in (self._wake_fd, *self._front_end.call_fds):
            waiting.register(fd, select.POLLIN)
        while True:
            with self._gate, self._lock:
                busy = self._turn()
                patience_s = self._patience_s()
            self._tell_actual()
            if not busy:
                waiting.poll(None if patience_s is None else patience_s * 1000)

    def wake(self) -> None:
        """Make the thread look; from any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def settle(self) -> None:
        """After the rings stopped: take back what the device used, so that the saved state is small."""
        with self._lock:
            self._take_acknowledged()
            self._report.settle()

    def save(self) -> dict[str, Any]:
        """The driver's part of the vCPU state."""
        with self._lock:
            return {
                "driver": self._driver.save(),
                "inflate": self._inflate.save(),
                "deflate": self._deflate.save(),
                "report": self._report.save(),
            }

    def save_rings(self) -> tuple[dict[str, Any], ...]:
        """The rings' part of the vCPU state, by queue."""
        with self._lock:
            return tuple(ring.save() for ring in self._rings)

    def restore(self, saved: dict[str, Any], rings: Sequence[dict[str, Any]]) -> None:
        """Take over what `save` and `save_rings` gave; writes nothing to RAM.

        Raises:
            RestoreError: state and RAM do not fit together.
        """
        try:
            for ring, state in zip(self._rings, rings, strict=True):
                ring.restore(state)
            self._driver.restore(saved["driver"])
            self._inflate.restore(saved["inflate"])
            self._deflate.restore(saved["deflate"])
            self._report.restore(saved["report"])
        except (RemoteProtocolError, KeyError, TypeError, AttributeError) as error:
            raise RestoreError(f"saved balloon driver: {error!r}") from error

    def close(self) -> None:
        """Let go of the rings, after the thread ended."""
        for ring in self._rings:
            ring.close()
        os.close(self._wake_fd)

    # --- turns: all of it under the lock ---

    def _turn(self) -> bool:
        """One bounded piece of work; whether there is more to do at once."""
        for fd in (self._wake_fd, *self._front_end.call_fds):
            _drain(fd)
        self._look_at_config()
        self._take_acknowledged()
        for queue, arrays in ((QUEUE_INFLATE, self._inflate), (QUEUE_DEFLATE, self._deflate)):
            if not arrays.pages_in_flight:
                self._obey(UsedBuffers(queue))
        if self._wants_retry and self._buddy.free_pages > self._buddy.reserve_pages + RETRY_SPARE_PAGES:
            self._obey(Retry())
        return self._go_on_reporting()

    def _look_at_config(self) -> None:
        if self._forget_command_id:
            if self._report.is_open:  # for a device that is gone
                self._report.end()
                return
            self._driver.command_id_active = CMD_ID_STOP
            self._forget_command_id = False
        config, self._config = self._config, None
        if config is not None:
            self._obey(ConfigChanged(config))
            if config.actual != self._driver.actual:  # a device that started anew
                self._actual_to_write = self._driver.actual

    def _obey(self, event: DriverEvent) -> None:
        """Tell the driver what happened and do what it says."""
        commands = self._driver.handle(event)
        while commands:
            commands = [
                following
                for command in commands
                for done in self._execute(command)
                for following in self._driver.handle(done)
            ]

    def _execute(self, command: DriverCommand) -> list[DriverEvent]:
        """Do one thing; what to tell the driver about it."""
        match command:
            case InflatePfns(count):
                pfns = self._buddy.alloc_blocks(0, count, kind=FrameKind.BALLOON, owner=OWNER_BALLOON)
                self._inflate.send(pfns)
                return [Submitted(QUEUE_INFLATE, int(pfns.size))]
            case DeflatePfns(count):
                pfns = np.flatnonzero(self._frames.owner == OWNER_BALLOON)[:count].astype(np.uint64)
                assert pfns.size == count, (pfns.size, count)
                self._deflate.send(pfns)
                return [Submitted(QUEUE_DEFLATE, count)]
            case WriteActual(pages):
                self._actual_to_write = pages
            case StartReport(command_id):
                self._report.start(command_id)
                self._report_moved_at = time.monotonic()
            case StopReport():
                self._report.end()
            case ReleaseHeld():
                self._report.release()
        return []

    def _take_acknowledged(self) -> int:
        """Take used page arrays back and free what was deflated; number of pages freed."""
        self._inflate.take_used()
        freed = self._deflate.take_used()
        if freed.size:
            self._buddy.free_bulk(freed)
        return int(freed.size)

    def _go_on_reporting(self) -> bool:
        """The next piece of a hint report; whether there is more to do at once."""
        now = time.monotonic()
        if self._report.step():
            self._report_moved_at = now
        elif self._report.is_open and now - self._report_moved_at > ROOM_WAIT_S_MAX:
            self._report.end()  # the device takes nothing: the rest is not hinted
            self._report.step()
        ended = self._report.take_ended()
        if ended is not None:
            self._obey(ReportEnded(ended))
        return self._report.has_work

    @property
    def _wants_retry(self) -> bool:
        return self._driver.num_pages > self._driver.actual and not self._inflate.pages_in_flight

    def _patience_s(self) -> float | None:
        """How long nothing needs to be done unless something happens; None: for ever."""
        if self._report.is_open:
            return ROOM_WAIT_S_MAX
        return RETRY_S if self._wants_retry else None

    def _tell_actual(self) -> None:
        """Write `actual` outside the gate and the lock: a node that hangs does not hold up a pause."""
        with self._lock:
            actual, self._actual_to_write = self._actual_to_write, None
        if actual is not None:
            self._front_end.write_actual(actual)

    def _deflate_for_memory(self, pages_wanted: int) -> int:
        """The pressure hook: deflate as Linux does on OOM, 256 pages at a time; number of pages freed."""
        deadline, freed = time.monotonic() + OOM_WAIT_S_MAX, 0
        with self._lock:
            while freed < pages_wanted and self._driver.actual:
                self._obey(OutOfMemory())
                if not self._wait_acknowledged(deadline):
                    break
                freed += self._take_acknowledged()
                for queue, arrays in ((QUEUE_INFLATE, self._inflate), (QUEUE_DEFLATE, self._deflate)):
                    if not arrays.pages_in_flight:
                        self._obey(UsedBuffers(queue))
        self.wake()  # the thread writes `actual`
        return freed

    def _wait_acknowledged(self, deadline: float) -> bool:
        """Wait until the device answers on the inflate or deflate queue; False when it does not in time."""
        if not self._inflate.pages_in_flight and not self._deflate.pages_in_flight:
            return False  # the driver may not deflate on OOM, or has nothing left
        waiting = select.poll()
        for queue in (QUEUE_INFLATE, QUEUE_DEFLATE):
            waiting.register(self._front_end.call_fds[queue], select.POLLIN)
        ready = waiting.poll(max(0.0, deadline - time.monotonic()) * 1000)
        for fd, _ in ready:
            _drain(fd)
        return bool(ready)


def _drain(eventfd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # nothing was signalled
        os.eventfd_read(eventfd)
