"""The balloon driver's logic, as in the merged Linux driver; its hands (pages, rings, threads) are elsewhere.

Rule 1: events in, commands out (`handle`); one inflation or deflation is under way at a time, so a page is
        never deflated before its inflation was acknowledged (section 5.5.6.1).
Rule 2: `actual` changes when the device acknowledged, and is written to the configuration space after each
        change.
Rule 3: a command id is reported for once: what counts is the id last read against the id last reported for. A
        running report ends as soon as the two differ; DONE gives the held pages back, after the report ended.
Rule 4: short of memory the driver stops where it is: no second try before the target changes or `Retry`.
Rule 5: a guest that expects freed memory to keep a value accepts reporting only together with PAGE_POISON, by
        which the device learns the value (section 5.5.3); for hints of blocks it does not hold, likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_STOP,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_RING_INDIRECT_DESC,
    F_SG,
    F_VERSION_1,
    PFN_ARRAY_MAX,
    QUEUE_DEFLATE,
    QUEUE_INFLATE,
    U32_MAX,
    BalloonConfig,
    has,
    mask,
)
from virtio.errors import DeviceProtocolError, LocalVirtioError, RemoteVirtioError

FEATURES_WANTED = mask(
    F_MUST_TELL_HOST, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_SG, F_RING_INDIRECT_DESC, F_VERSION_1
)
OOM_DEFLATE_PAGES = 256  # what Linux gives back at a time when memory runs out


@dataclass(frozen=True, slots=True)
class ConfigChanged:
    """The configuration space was read (again)."""

    config: BalloonConfig


@dataclass(frozen=True, slots=True)
class Submitted:
    """The hands put this many pages of an inflation or deflation on its queue, maybe fewer than asked.

    `partial`: fewer because the queue is full, and not because memory is short.
    """

    queue: int
    pages: int
    partial: bool = False


@dataclass(frozen=True, slots=True)
class UsedBuffers:
    """The device gave back everything that was on this queue."""

    queue: int


@dataclass(frozen=True, slots=True)
class ReportEnded:
    """The hands sent STOP at the end of the report for this id."""

    command_id: int


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """The guest needs pages back from the balloon."""


@dataclass(frozen=True, slots=True)
class MovePages:
    """The memory manager wants ballooned pages elsewhere: inflate their new places, then deflate the old ones.

    Answered by `InflatePfns` and, after its `UsedBuffers`, `DeflatePfns`; by nothing while another operation is
    under way (Linux answers -EAGAIN).
    """

    count: int


@dataclass(frozen=True, slots=True)
class Retry:
    """There may be memory again: go on towards the target."""


DriverEvent = ConfigChanged | Submitted | UsedBuffers | ReportEnded | OutOfMemory | MovePages | Retry


@dataclass(frozen=True, slots=True)
class InflatePfns:
    """Allocate up to `count` pages, put their numbers on the inflate queue, say `Submitted`.

    At most 256 numbers go into one array. The pages are not touched until they are deflated.
    """

    count: int


@dataclass(frozen=True, slots=True)
class DeflatePfns:
    """Put the numbers of up to `count` ballooned pages on the deflate queue, say `Submitted`.

    The pages are free when the queue's `UsedBuffers` came (with MUST_TELL_HOST never before).
    """

    count: int


@dataclass(frozen=True, slots=True)
class WriteActual:
    """Write this number to `actual` in the configuration space."""

    pages: int


@dataclass(frozen=True, slots=True)
class StartReport:
    """Send this id on the hint queue, free blocks while `report_continues`, then STOP; say `ReportEnded`."""

    command_id: int


@dataclass(frozen=True, slots=True)
class StopReport:
    """End the running report now: send STOP and say `ReportEnded`."""

    command_id: int


@dataclass(frozen=True, slots=True)
class ReleaseHeld:
    """Give every held (hinted) block back to the allocator."""


DriverCommand = InflatePfns | DeflatePfns | WriteActual | StartReport | StopReport | ReleaseHeld


@dataclass(slots=True)
class _Operation:
    """An inflation or deflation under way; `pages` is None until it was submitted.

    `moves`: an inflation after which as many other pages are deflated, wherever the target is.
    """

    queue: int
    asked: int
    pages: int | None = None
    moves: bool = False


class BalloonDriver:
    """The driver of one balloon.

    Attributes:
        features: what both sides agreed on; 0 before `negotiate`.
        num_pages: the host's target, as last read.
        actual: pages that are ballooned, as acknowledged.
        command_id_received: the command id last read from the configuration space.
        command_id_active: the id last reported for.
    """

    def __init__(
        self,
        *,
        wanted: int = FEATURES_WANTED,
        batch_pages: int = PFN_ARRAY_MAX,
        poison: int | None = None,
        holds_hinted: bool = True,
    ) -> None:
        """A driver that accepts at most `wanted` features and moves `batch_pages` at a time.

        `poison` is the value that freed memory keeps, None when nobody expects any; `holds_hinted`: hinted
        blocks stay allocated until DONE, and whoever releases them initialises them (section 5.5.6.5.1).

        Batches are bounded because pages that are allocated and not yet ballooned cannot be found by whoever
        runs out of memory meanwhile.
        """
        self.features = 0
        self.num_pages = 0
        self.actual = 0
        self.command_id_received = CMD_ID_STOP
        self.command_id_active = CMD_ID_STOP
        self._wanted = wanted
        self._poison = poison
        self._holds_hinted = holds_hinted
        self._batch_pages = batch_pages
        self._operation: _Operation | None = None
        self._reporting = False
        self._stop_asked = False
        self._waiting = False  # short of memory: no further inflation before a new target or `Retry`

    def negotiate(self, offered: int) -> int:
        """The features to accept of those offered.

        Raises DeviceProtocolError ("features") for a device from before virtio 1.0.
        """
        if not has(offered, F_VERSION_1):
            raise DeviceProtocolError("features", f"{offered:#x} lacks VERSION_1")
        accepted = offered & self._wanted
        if self._poison is None:
            accepted &= ~mask(F_PAGE_POISON)  # nothing to tell: free memory holds anything
        elif not has(accepted, F_PAGE_POISON):
            accepted &= ~mask(F_REPORTING)
            if not self._holds_hinted:
                accepted &= ~mask(F_FREE_PAGE_HINT)
        self.features = accepted
        return accepted

    @property
    def poison_to_write(self) -> int | None:
        """The poison_val to write before DRIVER_OK (section 5.5.6.6), None when it was not negotiated."""
        return self._poison if has(self.features, F_PAGE_POISON) else None

    @property
    def inflation_left(self) -> int:
        """Pages still to be found for the target, those of an inflation not yet submitted included."""
        operation = self._operation
        on_the_way = 0
        if operation is not None and operation.queue == QUEUE_INFLATE and not operation.moves:
            on_the_way = operation.pages or 0
        return 0 if self._waiting else max(0, self.num_pages - self.actual - on_the_way)

    @property
    def report_continues(self) -> bool:
        """Whether the running report may go on: the host neither said STOP nor DONE nor wants another."""
        return self._reporting and not self._stop_asked

    def handle(self, event: DriverEvent) -> list[DriverCommand]:  # noqa: PLR0911 - one for each event
        """What one event asks for, in order. Raises LocalVirtioError for an event that cannot be now."""
        match event:
            case ConfigChanged(config):
                return self._config_changed(config)
            case Submitted(queue, pages, partial):
                return self._submitted(queue, pages, partial)
            case UsedBuffers(queue):
                return self._used(queue)
            case ReportEnded(command_id):
                return self._report_ended(command_id)
            case OutOfMemory():
                return self._out_of_memory()
            case MovePages(count):
                return self._move(count)
            case Retry():
                self._waiting = False
                return self._towards_target()

    def save(self) -> dict[str, Any]:
        """The driver's state: small, of JSON types. What is not submitted yet is not part of it."""
        operation = self._operation
        pending = None
        if operation is not None and operation.pages is not None:
            pending = [operation.queue, operation.pages]
        return {
            "features": self.features,
            "num_pages": self.num_pages,
            "actual": self.actual,
            "received": self.command_id_received,
            "active": self.command_id_active,
            "waiting": self._waiting,
            "pending": pending,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`d state; a report that ran there is over (its threads are).

        Raises RemoteVirtioError ("driver_state") when the state cannot be; the driver is then unchanged.
        """
        try:
            words = [saved[name] for name in ("num_pages", "actual", "received", "active")]
            words_valid = all(type(word) is int and 0 <= word <= U32_MAX for word in words)
            features, waiting = saved["features"], saved["waiting"]
            pending = saved["pending"]
            operation = None if pending is None else _Operation(pending[0], pending[1], pending[1])
        except (KeyError, TypeError, IndexError) as error:
            raise RemoteVirtioError("driver_state", repr(error)) from error
        if (
            not words_valid
            or type(features) is not int
            or features & ~self._wanted
            or not isinstance(waiting, bool)
        ):
            raise RemoteVirtioError("driver_state", f"{saved}"[:300])
        if operation is not None and not _operation_valid(operation, saved["actual"]):
            raise RemoteVirtioError("driver_state", f"pending {pending}")
        self.num_pages, self.actual, self.command_id_received, self.command_id_active = words
        self.features, self._waiting, self._operation = features, waiting, operation
        self._reporting = self._stop_asked = False

    def _config_changed(self, config: BalloonConfig) -> list[DriverCommand]:
        if config.num_pages != self.num_pages:
            self.num_pages = config.num_pages
            self._waiting = False
        commands: list[DriverCommand] = []
        if has(self.features, F_FREE_PAGE_HINT):
            self.command_id_received = config.free_page_hint_cmd_id
            commands += self._hints()
        return commands + self._towards_target()

    def _hints(self) -> list[DriverCommand]:
        received, active = self.command_id_received, self.command_id_active
        if self._reporting:
            if received == active or self._stop_asked:
                return []
            self._stop_asked = True
            return [StopReport(active)]
        if received == CMD_ID_DONE:
            return [ReleaseHeld()]
        if received in (CMD_ID_STOP, active):
            return []
        self.command_id_active = received
        self._reporting, self._stop_asked = True, False
        return [StartReport(received)]

    def _report_ended(self, command_id: int) -> list[DriverCommand]:
        if not self._reporting or command_id != self.command_id_active:
            raise LocalVirtioError(f"no report for {command_id:#x} is running")
        self._reporting = self._stop_asked = False
        return self._hints()

    def _towards_target(self) -> list[DriverCommand]:
        count = min(abs(self.num_pages - self.actual), self._batch_pages)
        if self._operation is not None or count == 0:
            return []
        if self.num_pages < self.actual:
            self._operation = _Operation(QUEUE_DEFLATE, count)
            return [DeflatePfns(count)]
        if self._waiting:
            return []
        self._operation = _Operation(QUEUE_INFLATE, count)
        return [InflatePfns(count)]

    def _submitted(self, queue: int, pages: int, partial: bool) -> list[DriverCommand]:
        operation = self._operation
        if operation is None or operation.queue != queue or operation.pages is not None:
            raise LocalVirtioError(f"nothing was to be submitted on queue {queue}")
        if not 0 <= pages <= operation.asked:
            raise LocalVirtioError(f"{pages} pages submitted, {operation.asked} asked for")
        short = pages < operation.asked and not partial
        self._waiting = self._waiting or (queue == QUEUE_INFLATE and short)
        if pages == 0:
            self._operation = None
        operation.pages = pages
        return []

    def _used(self, queue: int) -> list[DriverCommand]:
        operation = self._operation
        if operation is None or operation.queue != queue or operation.pages is None:
            return []  # interrupts may be spurious, and the other queues need nothing from here
        self._operation = None
        self.actual += operation.pages if queue == QUEUE_INFLATE else -operation.pages
        if operation.moves:
            self._operation = _Operation(QUEUE_DEFLATE, operation.pages)
            return [WriteActual(self.actual), DeflatePfns(operation.pages)]
        return [WriteActual(self.actual), *self._towards_target()]

    def _move(self, count: int) -> list[DriverCommand]:
        if self._operation is not None:
            return []
        self._operation = _Operation(QUEUE_INFLATE, count, moves=True)
        return [InflatePfns(count)]

    def _out_of_memory(self) -> list[DriverCommand]:
        self._waiting = True  # or the next look at the target would take the pages again
        if not has(self.features, F_DEFLATE_ON_OOM) or self._operation is not None or self.actual == 0:
            return []
        count = min(OOM_DEFLATE_PAGES, self.actual)
        self._operation = _Operation(QUEUE_DEFLATE, count)
        return [DeflatePfns(count)]


def _operation_valid(operation: _Operation, actual: int) -> bool:
    pages = operation.pages
    if type(pages) is not int or not 0 < pages <= U32_MAX:
        return False
    return operation.queue == QUEUE_INFLATE or (operation.queue == QUEUE_DEFLATE and pages <= actual)
