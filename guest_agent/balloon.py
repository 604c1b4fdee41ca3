"""The balloon driver's hands: pages, rings and a thread for what virtio's BalloonDriver decides.

Rule 1: the driver decides, these hands execute, under one lock and in bounded turns inside the gate.
Rule 2: locks are taken in one order: balloon, then front-end or allocator. The front-end's callbacks take none.
Rule 3: pages are allocated without the balloon's lock, a bounded batch ahead of the device, and enqueued with it:
        an allocation may wait for the page cache, and whoever holds the cache's locks may be deflating.
Rule 4: a deflated page is free when the device acknowledged, never before (MUST_TELL_HOST).
Rule 5: when memory is out, the thread that needs it deflates by itself, 256 pages at a time and without allocating,
        and waits, boundedly, for the device. Pages allocated ahead come back first.
"""

from __future__ import annotations

import os
import select
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from guest_agent.balloon_options import BalloonOptions
from guest_agent.balloon_pages import BATCH_PAGES, BalloonPages
from guest_agent.errors import RestoreError
from guest_agent.front_end import drain
from guest_agent.hint_report import ROOM_WAIT_S_MAX
from guest_agent.hint_walk import hint_report
from guest_agent.memory_queues import MemoryQueues
from guest_agent.pressure import PRESSURE_BALLOON, PRESSURE_HELD
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    F_HINT_WAIT_ON_ACK,
    F_SG,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    BalloonConfig,
    has,
)
from virtio.balloon_driver import (
    ConfigChanged,
    DeflatePfns,
    InflatePfns,
    MovePages,
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
from virtio.errors import RemoteVirtioError, VhostUserError
from virtio.split_ring import DriverRing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator
    from guest_agent.frames import FrameTable
    from guest_agent.front_end import FrontEnd
    from guest_agent.gate import PauseGate
    from guest_agent.hint_report import BeforeKick
    from guest_agent.ram import GuestRam
    from guest_agent.ring_area import RingArea
    from virtio.balloon_driver import DriverCommand, DriverEvent

__all__ = ["Balloon"]

DEFAULT_OPTIONS = BalloonOptions()
RETRY_S = 0.2  # as Linux waits when it found no page for its balloon
RETRY_SPARE_PAGES = 8192  # and only when there is plenty again: no tug-of-war with the guest
ANSWER_S_MAX = 0.2  # some times what punching one batch takes: a device that is silent for longer is gone
MOVE_PAGES_MAX = 256  # an empty ring has an entry for each


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
        options: BalloonOptions = DEFAULT_OPTIONS,
    ) -> None:
        self._buddy = buddy
        self._front_end = front_end
        self._gate = gate
        self._lock = threading.RLock()
        self.options = options
        self._driver = options.driver(BATCH_PAGES)
        self._rings = [DriverRing(ram.memory, layout) for layout in area.layouts]
        kicks = [partial(front_end.kick, queue) for queue in range(len(self._rings))]
        self._pages = BalloonPages(self._rings, area, ram.memory, kicks, frames=frames, buddy=buddy)
        self._asked: int | None = None  # pages of an inflation that waits to be submitted
        self._look_ahead = False  # allocate for the next inflation while the device works on this one
        self._out_of_memory = False  # a deflation is under way in the thread that holds the lock
        self._moving_out: U64Array | None = None  # pages whose new places were sent
        self._report = hint_report(
            options.hints,
            self._report_wanted,
            ring=self._rings[QUEUE_HINT],
            area=area,
            memory=ram.memory,
            frames=frames,
            buddy=buddy,
            kick=kicks[QUEUE_HINT],
        )
        self._queues = MemoryQueues(
            self._rings, area, ram.memory, kicks, buddy=buddy, ballooned_pages=lambda: self.ballooned_pages
        )
        self._config: BalloonConfig | None = None  # read and not yet handled
        self._first_config = False  # the next one is the first of a newly connected device
        self._forget_command_id = False  # that device never issued the id reported last
        self._unloading = False
        self._actual_to_write: int | None = None
        self._report_moved_at = 0.0
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        buddy.add_pressure_hook(PRESSURE_HELD, self._report.give_back)
        buddy.add_pressure_hook(PRESSURE_BALLOON, self._deflate_for_memory)
        front_end.attach(self)

    @property
    def ballooned_pages(self) -> int:
        """Pages in the balloon, in flight or not."""
        return self._pages.ballooned

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

    @property
    def poison_to_write(self) -> int | None:
        """The poison value that the device must learn before the rings start."""
        return self._driver.poison_to_write

    def facts(self) -> dict[str, Any]:
        """What the guest's side of the balloon has done, for reports; all JSON."""
        return {
            "options": self.options.to_dict(),
            "features": self._driver.features,
            "reported_pages": self._queues.reported_pages,
            "allocate_ms": self._pages.allocate_ns / 1e6,
            "send_ms": self._pages.send_ns / 1e6,
            "hint_blocks_skipped": self._report.skipped_blocks,
        }

    def before_hint_kick(self, hook: BeforeKick) -> None:
        """Have this called between giving the first hints of a report and letting the device know of them."""
        self._report.before_kick = hook

    # --- the front-end's callbacks: no locks (rule 2) ---

    def negotiate(self, offered: int) -> int:
        """Pick features; once picked, a later device must offer them all. Raises RemoteVirtioError."""
        self._first_config = True
        agreed = self._driver.features
        if not agreed:
            agreed = self._driver.negotiate(offered)
            self._pages.use(runs=has(agreed, F_SG))
            return agreed
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
        """Do what is to be done, then wait for the device or the front-end; return when the driver was removed.

        Raises:
            GateShut: the agent ends.
            DeviceProtocolError: the device gave back buffers that it did not have.
        """
        waiting = select.poll()
        for fd in (self._wake_fd, *self._front_end.call_fds):
            waiting.register(fd, select.POLLIN)
        while not self._removed:
            # Before the gate: inside, it could be the wake that says it was shut meanwhile.
            drain(self._wake_fd)
            with self._gate:
                with self._lock:
                    busy = self._turn()
                    wanted = self._pages_to_allocate()
                    patience_s = self._patience_s()
                if wanted:
                    self.allocate_ahead(wanted)
                    busy = True
            self._tell_actual()
            if not busy and not self._removed:
                waiting.poll(None if patience_s is None else patience_s * 1000)

    def wake(self) -> None:
        """Make the thread look; from any thread."""
        os.eventfd_write(self._wake_fd, 1)

    def unload(self) -> None:
        """Give everything back to guest and host, as a driver that is removed; `run` returns when that is done."""
        with self._lock:
            self._unloading = True
            self._config = self._config or BalloonConfig(actual=self._driver.actual)
        self.wake()

    def detach(self) -> None:
        """The device is stopped and will not come back to this driver: what it still had is the guest's again."""
        self._buddy.remove_pressure_hook(self._report.give_back)
        self._buddy.remove_pressure_hook(self._deflate_for_memory)
        self._report.wait_on_ack = False
        self._report.give_back(self._buddy.pages)
        self._queues.reset()

    def settle(self) -> None:
        """After the rings stopped: take back what the device used and what never went out, to leave no state."""
        with self._lock:
            self._pages.take_acknowledged()
            self._pages.give_back()
            self._report.settle()

    def save(self) -> dict[str, Any]:
        """The driver's part of the vCPU state."""
        with self._lock:
            return {
                "options": self.options.to_dict(),
                "driver": self._driver.save(),
                "pages": self._pages.save(),
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
            self._pages.use(runs=has(self._driver.features, F_SG))
            self._pages.restore(saved["pages"])
            self._report.restore(saved["report"])
            self._report.wait_on_ack = has(self._driver.features, F_HINT_WAIT_ON_ACK)
        except (RemoteVirtioError, KeyError, TypeError, AttributeError) as error:
            raise RestoreError(f"saved balloon driver: {error!r}") from error

    def close(self) -> None:
        """Let go of the rings, after the thread ended."""
        for ring in self._rings:
            ring.close()
        os.close(self._wake_fd)

    # --- the memory manager's ---

    def allocate_ahead(self, count: int) -> None:
        """Find pages for the inflation that is next, without the lock (rule 3), then enqueue them with it."""
        runs = self._pages.allocate(count)
        with self._lock:
            recorded = self._pages.record_new(runs)
            if self._asked is not None:
                self._obey(self._submit_inflation(short=recorded < count))
            elif recorded > self._driver.inflation_left:
                self._pages.give_back()  # meanwhile the host or the guest changed its mind

    def move_pages(self, old: U64Array, new: U64Array) -> int:
        """Move ballooned pages: new places are inflated, old ones deflated and then free (compaction).

        Returns how many, from the first on: none when busy; what a silent device was told of counts. The lock is
        kept over all batches: the device's answers wake the thread, which would be busy in between.
        """
        if not self._lock.acquire(blocking=False):
            return 0
        moved = 0
        try:
            while moved < old.size and self._driver.handle(MovePages(min(old.size - moved, MOVE_PAGES_MAX))):
                part = slice(moved, min(moved + MOVE_PAGES_MAX, old.size))
                self._move_batch(old[part], new[part])
                moved = part.stop
        finally:
            self._lock.release()
        self.wake()  # the thread writes `actual`
        return moved

    def _move_batch(self, old: U64Array, new: U64Array) -> None:
        """The driver agreed: send the new places, and go on as the device answers, for a bounded time."""
        self._moving_out = old
        sent = self._pages.send_new(new)
        assert sent == new.size, (sent, new.size)  # nothing else is under way: the ring is empty
        self._obey(Submitted(QUEUE_INFLATE, sent))
        deadline = time.monotonic() + ANSWER_S_MAX
        while self._pages_in_flight and self._wait_acknowledged(deadline):
            self._take_acknowledged()

    # --- turns: all of it under the lock ---

    def _turn(self) -> bool:
        """One bounded piece of work; whether there is more to do at once."""
        for fd in self._front_end.call_fds:
            drain(fd)
        self._look_at_config()
        self._take_acknowledged()
        if self._pages.inflate.recorded_pages > self._driver.inflation_left:
            self._pages.give_back()  # the target sank
        if self._wants_retry and self._buddy.free_pages > self._buddy.reserve_pages + RETRY_SPARE_PAGES:
            self._obey(Retry())
        self._queues.step(self._driver.features)
        return self._go_on_reporting()

    def _report_wanted(self) -> bool:
        """Whether the host, as far as is known, still shows the id of the running report."""
        config = self._config
        return config is None or config.free_page_hint_cmd_id == self._driver.command_id_active

    def _look_at_config(self) -> None:
        if self._forget_command_id:
            if self._report.is_open:  # for a device that is gone
                self._report.end()
                return
            self._driver.command_id_active = CMD_ID_STOP
            self._forget_command_id = False
        config, self._config = self._config, None
        if config is not None:
            if self._unloading:  # whatever the host wants, this driver wants to be empty
                config = BalloonConfig(actual=config.actual, free_page_hint_cmd_id=CMD_ID_DONE)
            self._obey(ConfigChanged(config))
            if config.actual != self._driver.actual:  # a device that started anew
                self._actual_to_write = self._driver.actual

    def _obey(self, *events: DriverEvent) -> None:
        """Tell the driver what happened and do what it says, until nothing follows."""
        while events:
            commands = [command for event in events for command in self._driver.handle(event)]
            events = tuple(done for command in commands for done in self._execute(command))

    def _execute(self, command: DriverCommand) -> list[DriverEvent]:
        """Do one thing; what to tell the driver about it."""
        match command:
            case InflatePfns(count):
                self._asked = count
                if self._pages.inflate.recorded_pages:
                    return [self._submit_inflation()]
            case DeflatePfns(count):
                return [Submitted(QUEUE_DEFLATE, self._send_deflation(count))]
            case WriteActual(pages):
                self._actual_to_write = pages
            case StartReport(command_id):
                self._report.wait_on_ack = has(self._driver.features, F_HINT_WAIT_ON_ACK)
                self._report.start(command_id)
                self._report_moved_at = time.monotonic()
            case StopReport():
                self._report.end()
            case ReleaseHeld():
                self._report.release()
        return []

    def _submit_inflation(self, *, short: bool = False) -> Submitted:
        """Send what was allocated for the inflation asked for; `short`: there is no more of it to be had."""
        asked, self._asked = self._asked, None
        assert asked is not None
        sent = self._pages.send_inflation(asked)
        self._look_ahead = True
        return Submitted(QUEUE_INFLATE, sent, partial=not short or self._pages.inflate.recorded_pages > 0)

    def _send_deflation(self, count: int) -> int:
        moving_out, self._moving_out = self._moving_out, None
        if moving_out is not None:
            return self._pages.deflate.send_singly(moving_out)
        if self._out_of_memory:
            return self._pages.send_deflation_singly(count)
        return self._pages.send_deflation(count)

    def _pages_to_allocate(self) -> int:
        """What the next inflation needs: asked for, or foreseen while the device works on the one before."""
        if self._pages.inflate.recorded_pages:
            return 0
        if self._asked is not None:
            return self._asked
        if not self._look_ahead or not self._pages.inflate.pages_in_flight:
            return 0
        self._look_ahead = False  # once an operation, or a guest short of memory would be asked all the time
        return min(self._driver.inflation_left, BATCH_PAGES)

    @property
    def _pages_in_flight(self) -> int:
        return self._pages.inflate.pages_in_flight + self._pages.deflate.pages_in_flight

    def _take_acknowledged(self) -> int:
        """Take back what the device used, tell the driver, and free what was deflated; number of pages freed."""
        freed = self._pages.take_acknowledged()
        for number, queue in ((QUEUE_INFLATE, self._pages.inflate), (QUEUE_DEFLATE, self._pages.deflate)):
            if not queue.pages_in_flight:
                self._obey(UsedBuffers(number))
        return freed

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
    def _removed(self) -> bool:
        busy = self._driver.actual or self._asked or self._pages_in_flight
        return self._unloading and not (busy or self._report.is_open or self._report.has_work)

    @property
    def _wants_retry(self) -> bool:
        return self._driver.num_pages > self._driver.actual and not self._pages.inflate.pages_in_flight

    def _patience_s(self) -> float | None:
        """How long nothing needs to be done unless something happens; None: for ever."""
        if self._report.is_open:
            return ROOM_WAIT_S_MAX
        if self._wants_retry:
            return RETRY_S
        return self._queues.patience_s(self._driver.features)

    def _tell_actual(self) -> None:
        """Write `actual` outside the gate and the lock: a node that hangs does not hold up a pause."""
        with self._lock:
            actual, self._actual_to_write = self._actual_to_write, None
        if actual is not None:
            self._front_end.write_actual(actual)

    def _deflate_for_memory(self, pages_wanted: int) -> int:
        """The pressure hook: deflate as Linux does on OOM, 256 pages at a time; number of pages freed."""
        deadline = time.monotonic() + ANSWER_S_MAX
        with self._lock:
            self._out_of_memory = True
            if self._asked is not None:  # its pages are being allocated: they will find nobody who wants them
                self._asked = None
                self._obey(Submitted(QUEUE_INFLATE, 0))
            freed = self._pages.give_back()
            while freed < pages_wanted and self._driver.actual:
                self._obey(OutOfMemory())
                if not self._wait_acknowledged(deadline):
                    break
                freed += self._take_acknowledged()
            self._out_of_memory = False
        self.wake()  # the thread writes `actual`
        return freed

    def _wait_acknowledged(self, deadline: float) -> bool:
        """Wait until the device answers on the inflate or deflate queue; False when it does not in time."""
        if not self._pages_in_flight:  # the driver may not deflate on OOM, or has nothing left
            return False
        return self._front_end.wait_for_call((QUEUE_INFLATE, QUEUE_DEFLATE), deadline)
