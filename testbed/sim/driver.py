"""The balloon driver of a simulated guest: virtio's BalloonDriver, and hands for it.

Rule 1: the driver decides, these hands execute, in turns of the guest's own time.
Rule 2: hints, ballooned and reported pages go through real rings in guest memory; what is in flight the rings know.
Rule 3: a `hold` driver keeps hinted blocks until DONE and gives them back under pressure; a `walk` driver keeps
        nothing.
Rule 4: a deflated page is free when the device has answered; a driver that does not tell the host first uses it at
        once, and writes it, as it writes whatever it allocates.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from migration.pages import PAGE_BYTES, mask_runs, pfns_of, runs_of
from testbed.sim.guest_memory import (
    BALLOONED,
    DRIVER_PAGE,
    FREE,
    HELD,
    KERNEL_PAGES,
    REPORTED,
    RING_PAGES,
    RINGS,
    USED,
)
from virtio.balloon import (
    CMD_ID_STOP,
    F_MUST_TELL_HOST,
    F_REPORTING,
    F_SG,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    has,
    mask,
)
from virtio.balloon_driver import (
    FEATURES_WANTED,
    BalloonDriver,
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
from virtio.split_ring import DriverRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.pages import U64Array
    from testbed.sim.guest_memory import GuestMemory
    from testbed.sim.options import Options
    from virtio.balloon import BalloonConfig
    from virtio.balloon_driver import DriverCommand, DriverEvent

COMMAND_SLOTS = 64
ARRAYS_AT = {QUEUE_INFLATE: 2048, QUEUE_DEFLATE: 3072}  # in the driver's page, behind the commands
BATCH_PAGES = 48  # of one inflation or deflation; for want of memory the driver deflates more
BLOCK_PAGES_MAX = 4
SPARE_PAGES = 12  # that the balloon leaves to the guest
MOVED_PAGES = 4
MOVES, RETRIES, REPORTS = 0.03, 0.2, 0.15  # chances per turn
STOPS = 0.7  # chance that the largest lie is the last


@dataclass(slots=True)
class Report:
    """A report of free pages under way. `blocks` that are still to be hinted; None until the id was sent."""

    command_id: int
    blocks: list[tuple[int, int]] | None = None


class Driver:
    """One guest's. `kick` and `tell_actual` are the front-end's, while a device is there."""

    def __init__(self, memory: GuestMemory, options: Options) -> None:
        wanted = FEATURES_WANTED | (mask(F_REPORTING) if options.reports else 0)
        if not options.tells_host:
            wanted &= ~mask(F_MUST_TELL_HOST)
        if not options.balloon_runs:
            wanted &= ~mask(F_SG)
        queues = [QUEUE_HINT]
        queues += [QUEUE_INFLATE, QUEUE_DEFLATE] if options.balloon else []
        queues += [QUEUE_REPORTING] if options.reports else []
        self.balloon = BalloonDriver(wanted=wanted, batch_pages=BATCH_PAGES)
        self.rings = {queue: DriverRing(memory.ram.memory, RINGS[queue]) for queue in queues}
        self.hinted: deque[tuple[int, int]] = deque(maxlen=8)  # blocks hinted last
        self.kick: Callable[[int], None] = lambda _: None
        self.tell_actual: Callable[[int], None] = lambda _: None
        self._memory = memory
        self._options = options
        self._config: BalloonConfig | None = None  # read and not yet looked at
        self._report: Report | None = None
        self._slot = 0

    # -- the device ----------------------------------------------------------------------------

    def negotiate(self, offered: int) -> int:
        """The features: as they were, for a device that comes later."""
        return self.balloon.features or self.balloon.negotiate(offered)

    def config_changed(self, config: BalloonConfig) -> None:
        """The configuration space was read."""
        self._config = config

    def format(self) -> None:
        """Rings of a guest that boots."""
        for queue, ring in self.rings.items():
            ring.format()
            self._memory.ram.touched(RING_PAGES[queue])

    def deflating(self) -> U64Array:
        """Pages on the deflate queue that the device may not have heard of."""
        queue, pages = self.balloon.save()["pending"] or (QUEUE_INFLATE, 0)
        if queue != QUEUE_DEFLATE:
            return np.empty(0, np.uint64)
        if has(self.balloon.features, F_SG):
            return _pages_of(*self.rings[queue].buffers_in_flight())
        return self._array(queue, pages)

    # -- turns ---------------------------------------------------------------------------------

    def turn(self) -> None:
        """What the device gave back, the configuration, and the next piece of a report."""
        dice = self._memory.dice
        if self._options.balloon:
            self._take_acknowledged()
        config, self._config = self._config, None
        if config is not None:
            self._obey(ConfigChanged(config))
            if config.actual != self.balloon.actual:
                self.tell_actual(self.balloon.actual)
        if self._options.balloon:
            wants = self.balloon.num_pages > self.balloon.actual
            if wants and dice.random() < RETRIES and self._spare_pages:
                self._obey(Retry())
            if dice.random() < MOVES and min(self._spare_pages, self.balloon.actual) >= MOVED_PAGES:
                self._obey(MovePages(MOVED_PAGES))
        if self._options.reports:
            self._report_free()
        self._go_on_hinting()
        if self._options.guest_lies and dice.random() < 0.2:
            self._lie()

    def out_of_memory(self) -> None:
        """The guest needs pages."""
        if self._options.balloon:
            self._obey(OutOfMemory())

    def _obey(self, *events: DriverEvent) -> None:
        """Tell the driver what happened and do what it says."""
        while events:
            commands = [command for event in events for command in self.balloon.handle(event)]
            events = tuple(done for command in commands for done in self._execute(command))

    def _execute(self, command: DriverCommand) -> list[DriverEvent]:
        memory = self._memory
        match command:
            case InflatePfns(count):
                return [self._send(QUEUE_INFLATE, self._any(FREE, min(count, self._spare_pages)))]
            case DeflatePfns(count):
                return [self._send(QUEUE_DEFLATE, self._any(BALLOONED, count))]
            case WriteActual(pages):
                self.tell_actual(pages)
            case StartReport(command_id):
                self._report = Report(command_id)
            case StopReport():
                assert self._report is not None, "a report ends that never began"
                self._report.blocks = []
            case ReleaseHeld():
                memory.kinds[memory.kinds == HELD] = FREE
            case _ as never:
                assert_never(never)
        return []

    # -- the balloon ---------------------------------------------------------------------------

    @property
    def _spare_pages(self) -> int:
        return max(0, int(np.count_nonzero(self._memory.kinds == FREE)) - SPARE_PAGES)

    def _any(self, kind: int, count: int) -> U64Array:
        """So many pages of a kind, or all there are."""
        found = np.flatnonzero(self._memory.kinds == kind).astype(np.uint64)
        start = self._memory.dice.randrange(max(1, len(found) - count + 1))
        return found[start : start + count]

    def _send(self, queue: int, pfns: U64Array) -> Submitted:
        """Put pages on a queue, as many as it has room for."""
        memory = self._memory
        sent = (self._add_runs if has(self.balloon.features, F_SG) else self._add_array)(queue, pfns)
        if queue == QUEUE_INFLATE:
            memory.kinds[sent] = BALLOONED
        elif not has(self.balloon.features, F_MUST_TELL_HOST):
            memory.kinds[sent] = FREE
            memory.write(sent[: memory.dice.randint(0, 2)])
        if len(sent):
            self._publish(queue)
        return Submitted(queue, len(sent), partial=len(sent) < len(pfns))

    def _add_runs(self, queue: int, pfns: U64Array) -> U64Array:
        first, count = runs_of(pfns)
        added = self.rings[queue].add_inbufs(first * np.uint64(PAGE_BYTES), count * np.uint32(PAGE_BYTES))
        return pfns_of(first[:added], count[:added])

    def _add_array(self, queue: int, pfns: U64Array) -> U64Array:
        if len(pfns):
            at = DRIVER_PAGE * PAGE_BYTES + ARRAYS_AT[queue]
            self._memory.store(at, pfns.astype("<u4").tobytes())
            self.rings[queue].add([(at, 4 * len(pfns))], [], len(pfns))
        return pfns

    def _take_acknowledged(self) -> None:
        memory = self._memory
        for queue in (QUEUE_INFLATE, QUEUE_DEFLATE):
            ring = self.rings[queue]
            if not ring.in_flight:
                continue
            if has(self.balloon.features, F_SG):
                back = _pages_of(*ring.used_buffers())
            else:
                named = [
                    self._array(queue, used.token) for used in ring.used() if isinstance(used.token, int)
                ]
                back = named[0] if named else np.empty(0, np.uint64)
            if queue == QUEUE_DEFLATE:
                memory.kinds[back[memory.kinds[back] == BALLOONED]] = FREE
            if not ring.in_flight:
                self._obey(UsedBuffers(queue))

    def _array(self, queue: int, count: int) -> U64Array:
        """The page numbers of the operation under way."""
        at = DRIVER_PAGE * PAGE_BYTES + ARRAYS_AT[queue]
        return np.frombuffer(self._memory.ram.memory[at : at + 4 * count], "<u4").astype(np.uint64)

    # -- free page reporting -------------------------------------------------------------------

    def _report_free(self) -> None:
        """Tell the host of some free pages, which nobody takes until it has answered."""
        memory, ring = self._memory, self.rings[QUEUE_REPORTING]
        if ring.in_flight:
            back = _pages_of(*ring.used_buffers())
            memory.kinds[back[memory.kinds[back] == REPORTED]] = FREE
        elif memory.dice.random() < REPORTS:
            first, count = runs_of(memory.some(FREE, memory.dice.randint(1, 12)))
            memory.kinds[pfns_of(first, count)] = REPORTED
            if ring.add_inbufs(first * np.uint64(PAGE_BYTES), count * np.uint32(PAGE_BYTES)):
                self._publish(QUEUE_REPORTING)

    # -- hints ---------------------------------------------------------------------------------

    def _go_on_hinting(self) -> None:
        """One step of the report."""
        ring, report = self.rings[QUEUE_HINT], self._report
        if ring.in_flight:
            ring.discard_used()
        if report is None:
            return
        if report.blocks is None:
            if self._command(report.command_id):
                report.blocks = self._free_blocks()
        elif self.balloon.report_continues and report.blocks:
            self._hint_some(report.blocks)
        elif self._command(CMD_ID_STOP):
            self._report = None
            self._obey(ReportEnded(report.command_id))

    def _free_blocks(self) -> list[tuple[int, int]]:
        first, count = mask_runs(self._memory.kinds == FREE)
        return [
            (start, min(BLOCK_PAGES_MAX, run_end - start))
            for run_start, run_end in zip(first.tolist(), (first + count).tolist(), strict=True)
            for start in range(run_start, run_end, BLOCK_PAGES_MAX)
        ]

    def _hint_some(self, blocks: list[tuple[int, int]]) -> None:
        kinds, ring = self._memory.kinds, self.rings[QUEUE_HINT]
        for _ in range(min(self._memory.dice.randint(1, 6), len(blocks))):
            start, pages = blocks.pop()
            if (kinds[start : start + pages] != FREE).any():
                continue  # taken meanwhile: an honest driver hints what it has just allocated
            if ring.free_descriptors <= 1:
                break
            if self._options.hint_mode == "hold":
                kinds[start : start + pages] = HELD
            ring.add([], [(start * PAGE_BYTES, pages * PAGE_BYTES)], None)
            self.hinted.append((start, pages))
        self._publish(QUEUE_HINT)

    def _command(self, value: int, length: int = 4) -> bool:
        ring = self.rings[QUEUE_HINT]
        if ring.free_descriptors < 1:
            return False
        self._slot = (self._slot + 1) % COMMAND_SLOTS
        at = DRIVER_PAGE * PAGE_BYTES + 16 * self._slot
        self._memory.store(at, (value & 0xFFFF_FFFF).to_bytes(4, "little"))
        ring.add([(at, length)], [], None)
        self._publish(QUEUE_HINT)
        return True

    def _publish(self, queue: int) -> None:
        kick = self.rings[queue].publish()
        self._memory.stored(RING_PAGES[queue])
        if kick:
            self.kick(queue)

    def _lie(self) -> None:
        """What no driver may do: each costs the guest what it deserves, and nobody else anything."""
        memory, ring, void = self._memory, self.rings[QUEUE_HINT], self._memory.truth.void
        if ring.free_descriptors < 8:
            return
        match memory.dice.randrange(7):
            case 0:
                ring.add([], [((memory.ram.pages - 1) * PAGE_BYTES, 1000)], None)
            case 1:
                self._command(memory.dice.randrange(2, 2**32))
            case 2:
                self._command(self.balloon.command_id_received, length=3)
            case 3 if not void.all():  # all of memory, and that this was all
                void[:] = True
                # A ring that it may not write again would be lost, and the guest with it.
                first = KERNEL_PAGES if len(self.rings) > 1 else 0
                ring.add([], [(first * PAGE_BYTES, (memory.ram.pages - first) * PAGE_BYTES)], None)
                if memory.dice.random() < STOPS:
                    self._command(CMD_ID_STOP)
            case 4:
                self._give_away(QUEUE_INFLATE)
            case 5:
                self._give_away(QUEUE_DEFLATE)
            case _:
                self._give_away(QUEUE_HINT)
        self._publish(QUEUE_HINT)

    def _give_away(self, queue: int) -> None:
        """Pages that the guest goes on using."""
        ring, pfns = self.rings.get(queue), self._memory.some(USED, 3)
        if ring is None or ring.in_flight:
            return
        self._memory.truth.void[pfns] = True
        ring.add_inbufs(pfns * np.uint64(PAGE_BYTES), np.full(len(pfns), PAGE_BYTES, np.uint32))
        self._publish(queue)

    # -- leaving -------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """All that RAM does not say: a report under way ends here, the next host never saw it begin."""
        rings = {str(queue): ring.save() for queue, ring in self.rings.items()}
        return {"driver": self.balloon.save(), "rings": rings, "slot": self._slot}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave. Raises VirtioError."""
        for queue, ring in self.rings.items():
            ring.restore(saved["rings"][str(queue)])
        self.balloon.restore(saved["driver"])
        self._slot = saved["slot"]


def _pages_of(addresses: U64Array, lengths: Any) -> U64Array:
    first = addresses.astype(np.uint64) // np.uint64(PAGE_BYTES)
    return pfns_of(first, lengths.astype(np.uint64) // np.uint64(PAGE_BYTES))
