"""The balloon device of this host: a vhost-user back-end on a unix socket, served by one thread.

Rule 1: never wait for the guest: sockets do not block, interrupts are written and forgotten, rings are
        taken in bounded passes. A guest that floods or falls silent costs nobody but itself.
Rule 2: the device outlives its front-ends. A front-end that goes away takes rings and memory with it; balloon
        size, features, ids and counters stay, and the next one finds them. The newest connection is served.
Rule 3: garbage costs the connection it came on, and is counted by kind.
Rule 4: hints that arrive after `close_hints` drained the queue are stale, whatever id they are for.
Rule 5: the device outlives its node, too: what must go on (`DeviceStore`) is kept before the guest can see it.
Rule 6: DONE reaches the guest whatever happened: it is in the configuration space until the next id, for
        whoever connects to read.

Public methods are thread-safe: they run on the device's thread and return when done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from host.balloon_queues import BalloonQueues, HintBatch
from host.ballooned import unpack
from host.call_loop import READ, CallLoop
from host.device_status import CarriesDeviceState, DeviceState, DeviceStatus
from host.device_store import DeviceStore, KeptState
from host.errors import DeviceNotReady, DeviceStateUnreadable, LoopEnded
from host.peer_credentials import why_not_trusted
from host.vhost_connection import VhostConnection
from virtio.balloon import CMD_ID_FIRST, F_FREE_PAGE_HINT, QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE, has
from virtio.balloon_device import FEATURES_DEFAULT, BalloonDevice
from virtio.balloon_device import DeviceState as SavedDevice
from virtio.errors import LocalVirtioError, RemoteVirtioError, VhostUserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from host.device_log import DeviceLog
    from migration.page_bits import PageBits
    from virtio.balloon_stats import GuestStatistics

__all__ = ["BalloonServer", "DeviceState", "DeviceStatus", "HintBatch"]

PAGES_UNKNOWN = 1 << 32  # before a guest shared its RAM: as many as page frame numbers can name
QUIET_S_MAX = 10.0  # rings stop in milliseconds, a punch of GiB in tenths of a second
STATS_S_MAX = 2.0  # a guest answers in well under a millisecond, or it stands still


class BalloonServer:
    """One device, listening at `socket_path` from `start` to `stop`.

    Args:
        socket_path: created with mode 0600, removed by `stop`.
        sink: gets every `HintBatch` on the device's thread; it must not wait for this device.
        log: gets every store the device makes into guest RAM.
        features_offered: device feature bits.
        state_path: where the device is kept for a node that restarts; None: nowhere.

    Raises:
        DeviceStateUnreadable: there is something else at `state_path`.
    """

    def __init__(
        self,
        socket_path: str | Path,
        *,
        sink: Callable[[HintBatch], None],
        log: DeviceLog,
        features_offered: int = FEATURES_DEFAULT,
        state_path: Path | None = None,
    ) -> None:
        self.socket_path = os.fspath(socket_path)
        self._device = BalloonDevice(PAGES_UNKNOWN, features_offered=features_offered)
        self._queues = BalloonQueues(self._device, log, sink)
        self._done_owed = False
        self._store = None if state_path is None else DeviceStore(state_path)
        if self._store is not None:
            self._take_up(self._store)
        self._loop = CallLoop("balloon-device")
        self._listener: socket.socket | None = None
        self._spare_fd = -1  # given up for a moment to turn a front-end away when there is no other
        self._connection: VhostConnection | None = None
        self._connection_errors: Counter[str] = Counter()

    # --- life -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen and serve. Raises OSError when the path cannot be used or another device listens there."""
        try:
            self._listener = listen(self.socket_path)
        except BaseException:
            self._loop.stop()
            raise
        self._spare_fd = _spare()
        self._loop.watch(self._listener.fileno(), READ, self._accept)
        self._loop.start()

    def stop(self) -> None:
        """Stop the rings, drop the front-end, remove the socket. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            try:
                self._loop.call(partial(self._close, listener))
            except LoopEnded:  # its thread failed: nobody else touches any of this now
                self._close(listener)
        self._loop.stop()

    def _close(self, listener: socket.socket) -> None:
        self._drop()
        self._keep_or_count()
        self._loop.unwatch(listener.fileno())
        listener.close()
        self._give_spare_up()
        with contextlib.suppress(FileNotFoundError):  # somebody cleaned up before us
            os.unlink(self.socket_path)  # noqa: PTH108

    # --- what the roles ask for -------------------------------------------------------------------

    def open_hints(self) -> int:
        """Ask the guest to hint its free pages; returns the command id.

        Raises:
            DeviceNotReady: no driver with free page hinting is up, or a report is open already.
        """
        return self._loop.call(self._open_hints)

    def close_hints(self) -> HintBatch:
        """End the report: drain the queue, then show STOP. Returns what was still in the queue.

        Whatever comes later is stale. Harmless when no report is open.
        """
        return self._loop.call(self._close_hints)

    def hints_done(self) -> None:
        """Tell the guest that it may have its pages back."""
        self._loop.call(self._hints_done)

    def set_num_pages(self, num_pages: int) -> None:
        """Ask the guest for a balloon of this size.

        Raises:
            DeviceNotReady: no guest has shared its RAM yet.
            ValueError: more pages than the guest has.
        """
        self._loop.call(lambda: self._set_num_pages(num_pages))

    def guest_stats(self, timeout: float = STATS_S_MAX) -> GuestStatistics:
        """Ask the guest for fresh memory statistics (section 5.5.6.3) and wait for them.

        Raises:
            DeviceNotReady: no driver with a statistics queue is up, or it did not answer in time.
        """
        answer = self._loop.call(self._ask_stats)
        try:
            return answer.result(timeout)
        except TimeoutError:
            self._loop.call(lambda: self._queues.stats.forget(answer))
            raise DeviceNotReady(f"the guest gave no statistics within {timeout:g} s") from None

    def status(self) -> DeviceStatus:
        """How things stand now."""
        return self._loop.call(self._status)

    def device_state(self) -> DeviceState:
        """What the destination's device must carry on with. Complete once the rings are stopped."""
        return self._loop.call(self._device_state)

    def ballooned(self, pages: int) -> PageBits:
        """The pages that are in the balloon and have no storage, of a guest of `pages` pages; a copy."""
        return self._loop.call(lambda: self._queues.pages.ballooned.bits(pages))

    def disconnect(self) -> None:
        """End the connection of a guest that is gone; the next front-end may be another guest's."""
        self._loop.call(self._drop)

    def adopt_state(self, state: CarriesDeviceState, pages: int = 0) -> None:
        """Become the device that a guest had elsewhere, before its agent connects here.

        Rings go on at the bases that the front-end gives. Hints of the report it may still hold are stale.
        `pages` is the guest's memory; 0 takes no ballooned pages over.

        Raises:
            DeviceNotReady: a front-end is connected.
            virtio.errors.RemoteVirtioError: the state cannot be, or wants a feature that is not offered.
            migration.errors.RemoteProtocolError: the ballooned pages are not those of such a guest.
        """
        ballooned = unpack(state.ballooned, pages) if pages else None
        self._loop.call(lambda: self._adopt(state, ballooned))

    def rings_stopped(self, timeout: float = QUIET_S_MAX) -> None:
        """Wait until no ring runs: the device touches guest RAM no more, and all its stores are logged.

        Raises:
            DeviceNotReady: rings still run after `timeout` seconds.
        """
        if not self._queues.quiet.wait(timeout):
            raise DeviceNotReady(f"the balloon's rings still run after {timeout:g} s")

    def serve_out(self) -> None:
        """Serve what the rings of a paused guest still hold: the device stores nothing into its RAM afterwards.

        For guests whose rings run on while they are paused (nobody can ask a frozen front-end to stop them).
        What stays out is what the host itself begins: ask for no statistics meanwhile.
        """
        self._loop.call(self._queues.serve_out)

    # --- the same, on the device's thread ---------------------------------------------------------

    def _ready(self) -> bool:
        heard = self._connection is not None and self._connection.hears_announcements
        needed = {QUEUE_INFLATE, QUEUE_DEFLATE}
        if has(self._device.features, F_FREE_PAGE_HINT):
            needed.add(QUEUE_HINT)
        return heard and self._queues.running >= needed

    def _open_hints(self) -> int:
        if not self._ready():
            raise DeviceNotReady("no guest driver is up that could hint its free pages")
        try:
            command_id = self._device.open_hints()
        except LocalVirtioError as error:
            raise DeviceNotReady(str(error)) from error
        self._done_owed = True
        try:
            self._keep()  # before the guest hears of the id
        except DeviceNotReady:
            self._device.close_hints()
            raise
        self._queues.command_id = command_id
        self._announce()
        return command_id

    def _close_hints(self) -> HintBatch:
        try:
            last = self._queues.drain_hints()
        except VhostUserError as error:
            self._gone(error.kind)
            last = self._queues.drain_hints()  # of no queue
        was_shown = self._device.hints.config_command_id
        self._device.close_hints()
        if self._device.hints.config_command_id != was_shown:
            self._announce()
        return last

    def _hints_done(self) -> None:
        self._device.hints_done()
        self._done_owed = False
        self._keep_or_count()  # if it cannot be kept, a restart says DONE once more
        self._announce()

    def _ask_stats(self) -> Future[GuestStatistics]:
        try:
            return self._queues.ask_stats()
        except VhostUserError as error:
            self._gone(error.kind)
            raise DeviceNotReady(str(error)) from error

    def _set_num_pages(self, num_pages: int) -> None:
        if not self._queues.mapped:
            raise DeviceNotReady("no guest has connected its balloon")
        if not 0 <= num_pages <= self._device.pages:
            raise ValueError(f"a balloon of {num_pages} pages in a guest of {self._device.pages}")
        before = self._device.config.num_pages
        self._device.set_num_pages(num_pages)
        try:
            self._keep()
        except DeviceNotReady:
            self._device.config.num_pages = before
            raise
        self._announce()

    def _status(self) -> DeviceStatus:
        pages, stats = self._queues.pages, self._queues.stats
        return DeviceStatus(
            ready=self._ready(),
            features=self._device.features,
            num_pages=self._device.config.num_pages,
            actual=self._device.config.actual,
            hints_negotiated=has(self._device.features, F_FREE_PAGE_HINT),
            hints_refusal=self._device.hints_refusal,
            poison_value=self._device.poison,
            hint_state=self._device.hints.state.value,
            inflated_pages=pages.inflated_pages,
            deflated_pages=pages.deflated_pages,
            reported_pages=pages.reported_pages,
            released_pages=pages.released_pages,
            guest_errors=dict(+self._device.guest_errors),
            connection_errors=dict(self._connection_errors),
            queue_numbering=self._queues.numbers.numbering,
            memory_sealed=self._queues.sealed,
            stats=stats.latest.values,
            stats_at_ns=stats.at_ns,
            stats_unknown_tags=stats.latest.unknown_tags,
        )

    def _device_state(self) -> DeviceState:
        saved = self._device.save()
        return DeviceState(
            features=saved["features"],
            num_pages=saved["num_pages"],
            actual=saved["actual"],
            poison_value=saved["poison_value"],
            next_command_id=saved["next_command_id"],
            hints_open=self._done_owed,
            ring_bases=self._queues.ring_bases(),
        )

    def _adopt(self, state: CarriesDeviceState, ballooned: PageBits | None) -> None:
        if self._connection is not None:
            raise DeviceNotReady("a guest is connected; its device cannot become another's")
        self._device.pages = PAGES_UNKNOWN
        self._device.restore(
            SavedDevice(
                features=state.features,
                num_pages=state.num_pages,
                actual=state.actual,
                poison_value=state.poison_value,
                next_command_id=state.next_command_id,
                hints_open=state.hints_open,
            )
        )
        if ballooned is not None:
            self._queues.pages.ballooned.become(ballooned)
        self._done_owed = state.hints_open
        self._keep()

    # --- across restarts of the node --------------------------------------------------------------

    def _take_up(self, store: DeviceStore) -> None:
        """Go on as the device that was kept. A report that was open then is over, and the guest is told so."""
        kept = store.load()
        if kept is None:
            return
        saved = SavedDevice(
            features=kept.features & self._device.features_offered,
            num_pages=kept.num_pages,
            actual=kept.actual,
            poison_value=kept.poison_value,
            next_command_id=kept.next_command_id,
            hints_open=kept.done_owed,
        )
        try:
            self._device.restore(saved)
        except RemoteVirtioError as error:
            raise DeviceStateUnreadable(store.path, str(error)) from error
        # The migration that asked for hints died with the node; or DONE was said, and a guest that looks rarely had
        # not read it yet. To one that holds nothing it means nothing.
        if kept.done_owed or kept.next_command_id != CMD_ID_FIRST:
            self._device.hints_done()

    def _keep(self) -> None:
        """Raises DeviceNotReady when the state cannot be written: what needs it must not happen."""
        if self._store is None:
            return
        saved = self._device.save()
        kept = KeptState(
            features=saved["features"],
            num_pages=saved["num_pages"],
            actual=saved["actual"],
            poison_value=saved["poison_value"],
            next_command_id=saved["next_command_id"],
            done_owed=self._done_owed,
        )
        try:
            self._store.keep(kept)
        except OSError as error:
            raise DeviceNotReady(
                f"the device's state cannot be kept in {self._store.path}: {error}"
            ) from error

    def _keep_or_count(self) -> None:
        try:
            self._keep()
        except DeviceNotReady:
            self._connection_errors["state_not_kept"] += 1

    def _driver_wrote(self) -> None:
        """Features or configuration: kept once a turn, however often a guest writes."""
        self._loop.soon("keep", self._keep_or_count)

    # --- connections ------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = self._listener
        if listener is None:
            return  # `stop` was called, and its `_close` waits for its turn
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # gone before it was served
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._connection_errors["no_descriptors"] += 1
            self._turn_away(listener)
            return
        if why_not_trusted(connection):
            self._connection_errors["wrong_user"] += 1
            connection.close()
            return
        self._drop()
        self._connection = VhostConnection(
            connection, self._loop, self._queues, on_gone=self._gone, on_write=self._driver_wrote
        )

    def _turn_away(self, listener: socket.socket) -> None:
        """There is no descriptor for who waits. Left there, it would wake the loop for ever; it may come again."""
        self._give_spare_up()
        with contextlib.suppress(OSError):  # somebody else took the descriptor: the next turn tries again
            listener.accept()[0].close()
            self._spare_fd = _spare()

    def _give_spare_up(self) -> None:
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1

    def _gone(self, kind: str) -> None:
        if kind:
            self._connection_errors[kind] += 1
        self._drop()

    def _drop(self) -> None:
        """End the connection, if there is one; the device stays as it is."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        self._queues.unmap()

    def _announce(self) -> None:
        if self._connection is not None:
            self._connection.announce()


def _spare() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)


def listen(path: str) -> socket.socket:
    """A non-blocking stream listener at `path`, 0600 from its first moment.

    Raises:
        OSError: the path cannot be used, or somebody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        answer = probe.connect_ex(path)
    if answer == errno.ECONNREFUSED:
        os.unlink(path)  # noqa: PTH108 - left behind by a process that was killed
    elif answer != errno.ENOENT:
        raise OSError(answer, f"cannot listen, is another device there? {os.strerror(answer)}", path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: the file is never there with wider rights
        listener.bind(path)
        listener.listen(4)
    except BaseException:
        listener.close()
        raise
    return listener
