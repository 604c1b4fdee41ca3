"""One migration at the source: a thread that feeds the machine with facts and carries its orders out.

Rule 1: one thread does everything; other threads (gRPC, balloon device, cancel) only post events.
Rule 2: reading and sending is the page stream's; this thread is always free for the next event.
Rule 3: a command that fails is an event (HostFailed, PeerLost), with its reason in one line; what is not
        foreseen is logged with its traceback and treated as HostFailed. Only the journal is beyond that:
        without it nothing may be decided, and the attempt stands still until the process is restarted.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import grpc
import numpy as np
import structlog

from host.clock import now_ns
from host.errors import HostError, JournalConflict
from host.resources import cpu_seconds
from host.trackers import DirtyTracker, HashTracker, UffdTracker
from migration import commands as do
from migration import events as told
from migration.codec import image_digest
from migration.errors import ProtocolError
from migration.pb import migration_pb2
from migration.source_machine import SourceMachine
from migration.source_phases import SourcePhase
from source_node.accounting import Stopwatch
from source_node.artefacts import write_artefacts
from source_node.destination import Destination, id_message
from source_node.hint_log import HintLog
from source_node.page_reader import PageReader
from source_node.wire_account import WireAccount

if TYPE_CHECKING:
    from host.balloon_server import HintBatch
    from host.context import HostContext
    from migration.identity import AttemptKey
    from migration.rounds import Limits
    from source_node.page_stream import PageStream

PROGRESS_PERIOD_NS = 100_000_000
STREAM_CLOSE_TIMEOUT_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, checked."""

    key: AttemptKey
    dest_address: str
    skip: told.Skip
    tracker: str
    tracker_reason: str
    integrity: str
    hint_wait_ms: int
    limits: Limits


class MigrationRun:
    """Begins with `start`; ends with the event migration_ended."""

    def __init__(self, host: HostContext, order: Order) -> None:
        assert host.guest.ram is not None, "a migration needs a guest"
        self.order = order
        self._host = host
        self._ram = host.guest.ram
        self._machine = SourceMachine()
        self._events: queue.SimpleQueue[told.SourceEvent] = queue.SimpleQueue()
        self._timers: dict[told.Timer, int] = {}
        self._watch = Stopwatch()
        self._progress_ns = 0
        self._progress_bytes = 0
        self._destination: Destination | None = None
        self._reader: PageReader | None = None
        self._stream: PageStream | None = None
        self._tracker: DirtyTracker | None = None
        self._wire = WireAccount(order.dest_address)
        self._hint_log = HintLog(host.events)
        self._prepare = migration_pb2.PrepareRequest()
        self._outcome: do.EndMigration | None = None
        self._thread = threading.Thread(target=self._main, name="migration", daemon=True)

    # -- from other threads --------------------------------------------------------------------

    def start(self) -> None:
        """Begin in a thread of its own."""
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    @property
    def ended(self) -> bool:
        """Whether the thread has done everything."""
        return self._outcome is not None and not self._thread.is_alive()

    def cancel(self, reason: str) -> tuple[bool, str]:
        """Post the wish; (whether it can be effective, the phase)."""
        phase = self._machine.phase
        self._events.put(told.CancelRequested(reason))
        return self._machine.reversible, phase.name

    def _post(self, event: told.SourceEvent) -> None:
        self._events.put(event)

    @property
    def _peer(self) -> Destination:
        assert self._destination is not None, "no destination was opened"
        return self._destination

    @property
    def _pages(self) -> PageStream:
        assert self._stream is not None, "no page stream was opened"
        return self._stream

    @property
    def _ram_reader(self) -> PageReader:
        assert self._reader is not None, "tracking was not started"
        return self._reader

    def _on_hints(self, batch: HintBatch) -> None:
        self._events.put(_hints_reported(batch))

    # -- the loop ------------------------------------------------------------------------------

    def _main(self) -> None:
        order = self.order
        self._host.events.add(
            "migration_started",
            migration=order.key.migration,
            attempt=order.key.attempt,
            guest_epoch=order.key.guest_epoch,
            skip=order.skip.value,
            tracker=order.tracker,
            tracker_reason=order.tracker_reason,
            integrity=order.integrity,
        )
        self._watch.requested_ns = now_ns()
        self._host.hints.listen(self._on_hints)
        self._host.guest.listen_for_loss(lambda why: self._post(told.HostFailed(why)))
        try:
            self._feed(
                told.MigrationRequested(
                    order.key, self._ram.pages, order.skip, order.limits, order.hint_wait_ms
                )
            )
            while not self._machine.ended:
                event = self._next_event()
                if event is not None:
                    self._feed(event)
        except (JournalConflict, sqlite3.Error) as error:
            log.exception("journal_failed")
            self._outcome = do.EndMigration("failed", f"the journal forbids it: {error}")
        finally:
            self._finish()

    def _feed(self, event: told.SourceEvent) -> None:
        if isinstance(event, told.HintsReported):
            self._hint_log.reported(event)
        for command in self._machine.handle(event, now_ns()):
            self._execute(command)

    def _next_event(self) -> told.SourceEvent | None:
        """The next fact; None when a moment passed without one: timers and progress are looked at then."""
        instant = now_ns()
        for timer, at_ns in self._timers.items():
            if at_ns <= instant:
                del self._timers[timer]
                return told.TimerFired(timer)
        self._progress(instant)
        until_ns = min([*self._timers.values(), instant + PROGRESS_PERIOD_NS])
        try:
            return self._events.get(timeout=(until_ns - instant) / 1e9)
        except queue.Empty:
            return None

    def _progress(self, instant: int) -> None:
        rounds = self._machine.round_set
        if rounds is None or self._stream is None or instant - self._progress_ns < PROGRESS_PERIOD_NS:
            return
        since_ns, self._progress_ns = self._progress_ns or instant - PROGRESS_PERIOD_NS, instant
        ledger, batch = rounds.ledger, self._stream.batch_sent
        payload_bytes = self._wire.payload_bytes + ledger.payload_bytes + batch.payload_bytes
        self._host.events.add(
            "progress",
            round=rounds.index,
            sent_pages=ledger.sent_pages + batch.data_pages,
            zero_pages=ledger.zero_pages + batch.zero_pages,
            skipped_pages=ledger.skipped_pages,
            remaining_pages=rounds.remaining,
            payload_bytes=payload_bytes,
            rate_bytes_per_s=round((payload_bytes - self._progress_bytes) * 1e9 / (instant - since_ns)),
        )
        self._progress_bytes = payload_bytes

    # -- told by the page stream -----------------------------------------------------------------

    def pages_sent(self, sent: told.PagesSent) -> None:
        """A batch left."""
        self._events.put(sent)

    def all_acknowledged(self) -> None:
        """Everything sent is stored."""
        self._events.put(told.AllAcknowledged())

    def stream_lost(self, reason: str) -> None:
        """No more pages can go."""
        self._events.put(told.PeerLost(reason))

    # -- orders --------------------------------------------------------------------------------

    def _execute(self, command: do.SourceCommand) -> None:
        try:
            self._carry_out(command)
        except (JournalConflict, sqlite3.Error):
            raise
        except (HostError, OSError, grpc.RpcError, ProtocolError) as error:
            self._post(told.HostFailed(f"{type(command).__name__}: {' '.join(str(error).split())}"))
        except Exception as error:
            log.exception("command_failed", command=type(command).__name__)
            self._post(told.HostFailed(f"{type(command).__name__}: {type(error).__name__}: {error}"))

    def _carry_out(self, command: do.SourceCommand) -> None:  # noqa: C901, PLR0912, PLR0915 - one arm per order
        match command:
            case do.RecordState():
                self._record(command)
            case do.OpenDestination(key):
                self._open(key)
            case do.StartTracking():
                self._start_tracking()
            case do.Harvest():
                self._harvest()
            case do.OpenHints():
                command_id = self._host.balloon.open_hints()
                round_set = self._machine.round_set
                self._hint_log.opened(command_id, round_set.index if round_set else 0)
                self._post(told.HintsOpened(command_id))
            case do.CloseHints():
                closed = told.HintsClosed(_hints_reported(self._host.balloon.close_hints()))
                self._hint_log.closed(closed.last)
                self._post(closed)
            case do.EndHints():
                self._host.balloon.hints_done()
                self._host.events.add("hints_done")
            case do.ArmTimer(timer, delay_ms):
                self._timers[timer] = now_ns() + delay_ms * 1_000_000
            case do.DisarmTimer(timer):
                self._timers.pop(timer, None)
            case do.SendPages(round_index, pfns):
                self._pages.send(self._ram_reader.chunks_of(round_index, pfns))
            case do.AwaitAcknowledgements():
                round_set = self._machine.round_set
                marker = self._ram_reader.marker(round_set.index if round_set else 0)
                self._pages.await_acknowledgements(marker)
            case do.PauseGuest():
                self._pause()
            case do.SaveGuest():
                self._save()
            case do.SendPrepare():
                self._watch.begin("prepare", now_ns())
                self._peer.prepare(self._prepare)
            case do.SendCommit(_, digest):
                self._peer.commit(digest)
            case do.ResumeGuest(key):
                self._host.guest.link.resume(key.guest_epoch)
                self._post(told.GuestResumed())
            case do.FreezeGuest():
                self._given_away()
            case do.AbortDestination(_, reason):
                self._abandon(reason)
            case do.ForgetDestination():
                if problem := self._peer.forget():
                    self._host.events.add("forget_unheard", reason=problem)
            case do.Note(name, fields):
                self._note(name, fields)
            case do.EndMigration():
                self._outcome = command
            case _ as never:
                assert_never(never)

    def _record(self, command: do.RecordState) -> None:
        journal, key, state = self._host.journal, command.key, command.state
        if state is told.Recorded.STARTED:
            journal.begin(key, "source", state.value, detail=self.order.dest_address)
        elif state is told.Recorded.COMPLETED:
            journal.move(key, "source", {"COMMITTING"}, state.value, detail=command.reason)
        elif state is told.Recorded.COMMITTING:
            self._watch.end("prepare", now_ns())
            self._watch.begin("commit", now_ns())
            digest = self._prepare.image_digest
            detail = self.order.dest_address
            journal.move(key, "source", {"STARTED"}, state.value, digest=digest, detail=detail)
        else:
            journal.move(key, "source", {"STARTED", "COMMITTING"}, state.value, detail=command.reason)
        self._post(told.StateRecorded(state))

    def _open(self, key: AttemptKey) -> None:
        self._destination = Destination(self.order.dest_address, key, self._post)
        self._destination.open(self._ram.memory_bytes, self.order.integrity)

    def _start_tracking(self) -> None:
        self._wire.start()
        self._reader = PageReader(
            self._ram,
            incarnation=self._peer.incarnation,
            attempt=self.order.key.attempt,
            detects_zero=self.order.skip.detects_zero,
        )
        self._stream = self._peer.page_stream(self, bytes_per_second=self.order.limits.bandwidth)
        log_, scanner = self._host.device_log, self._host.guest.scanner
        if self.order.tracker == "uffd":
            assert scanner is not None, "the tracker was probed when the order was checked"
            self._tracker = UffdTracker(scanner, log_)
        else:
            self._tracker = HashTracker(self._ram, self._reader.sent_hashes, log_)
        self._tracker.start()
        self._reader.find_holes()
        self._watch.first_round_ns = now_ns()
        self._post(told.TrackingStarted())

    def _harvest(self) -> None:
        assert self._tracker is not None, "tracking was not started"
        started_ns = now_ns()
        dirty = self._tracker.harvest()
        duration_ns = now_ns() - started_ns
        if self._machine.phase is SourcePhase.FINAL_HARVESTING:
            self._watch.parts_ns["harvest"] = duration_ns
            self._watch.begin("send", now_ns())
        self._host.events.add(
            "harvested", duration_ms=duration_ns / 1e6, dirty_pages=int(np.count_nonzero(dirty))
        )
        self._post(told.Harvested(dirty))

    def _pause(self) -> None:
        self._watch.pause_ordered_ns = now_ns()
        self._watch.begin("pause", now_ns())
        self._host.guest.link.pause()
        self._watch.end("pause", now_ns())
        self._host.events.add("guest_paused", downtime_starts_ns=self._watch.pause_ordered_ns)
        self._post(told.GuestPaused())

    def _save(self) -> None:
        self._watch.end("send", now_ns())
        self._watch.begin("save", now_ns())
        vcpu_state = self._host.guest.link.save()
        device = self._host.balloon.device_state()
        if not self._pages.close(STREAM_CLOSE_TIMEOUT_S):
            raise HostError("the destination did not end the page stream")
        state = migration_pb2.DeviceState(
            features=device.features,
            num_pages=device.num_pages,
            actual=device.actual,
            poison_value=device.poison_value,
            next_command_id=device.next_command_id,
            ring_bases=device.ring_bases,
            hints_open=device.hints_open,
        )
        digest = image_digest(
            self._ram_reader.sent_hashes, vcpu_state, state.SerializeToString(deterministic=True)
        )
        sent = self._machine.ledger
        self._prepare = migration_pb2.PrepareRequest(
            id=id_message(self.order.key),
            incarnation=self._peer.incarnation,
            image_digest=digest,
            vcpu_state=vcpu_state,
            device=state,
            chunks=self._pages.sent_chunks,
            ledger=migration_pb2.Ledger(
                data_pages=sent.sent_pages, zero_pages=sent.zero_pages, skipped_pages=sent.skipped_pages
            ),
        )
        self._watch.end("save", now_ns())
        self._post(told.GuestSaved(digest))

    def _given_away(self) -> None:
        peer = self._peer
        self._watch.decided(now_ns(), verify_ns=peer.verify_ns, resume_ns=peer.resume_ns)
        self._host.guest.link.freeze()
        self._host.events.add("committed")

    def _abandon(self, reason: str) -> None:
        if self._stream is not None:
            self._stream.cancel()
        if self._destination is not None and (problem := self._destination.abort(reason)):
            self._host.events.add("abort_unheard", reason=problem)

    def _note(self, name: str, fields: dict[str, object]) -> None:
        if name == "round_ended":
            fields |= self._wire.round_ended(self._machine.ledger, self._pages, self._peer)
            fields["hint_ranges"] = self._hint_log.ranges
        if name in {"round_started", "round_ended"}:
            fields["cpu_seconds"] = cpu_seconds()  # of this process so far: what a round cost is a difference
        self._host.events.add(name, **fields)

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Release everything, write what a judge will ask for, tell the outcome."""
        self._watch.ended_ns = now_ns()
        self._host.hints.listen(None)
        self._host.guest.listen_for_loss(None)
        outcome = self._outcome or do.EndMigration("failed", "internal error, see the node's log")
        if outcome.outcome != "completed" and not self._host.guest.alive():
            # Its RAM and its vCPU state were in that process: there is nothing left that anybody could run.
            outcome = do.EndMigration("guest_lost", outcome.reason)
        byte_counts = self._wire.totals(self._machine.ledger, self._stream, self._destination)
        if self._stream is not None:
            self._stream.cancel()
        if self._destination is not None:
            self._destination.close()
        if self._tracker is not None:
            self._tracker.stop()
        artefacts: list[str] = []
        if outcome.outcome == "completed":
            artefacts = write_artefacts(
                self._host, self._ram, self._ram_reader.sent_hashes, self.order.integrity
            )
        self._host.events.add("node_resources", **self._host.resources.fields())
        self._host.events.add(
            "migration_ended",
            outcome=outcome.outcome,
            reason=outcome.reason,
            **self._watch.times(),
            hints=self._machine.ledger.to_dict(),
            bytes=byte_counts,
            artefacts=artefacts,
            engine={"tracker": self.order.tracker, "tracker_reason": self.order.tracker_reason},
        )
        self._outcome = outcome


def _hints_reported(batch: HintBatch) -> told.HintsReported:
    return told.HintsReported(
        command_id=batch.command_id,
        pfn_first=batch.pfn_first,
        page_count=batch.page_count,
        stopped=batch.stopped,
        stale_pages=batch.stale_pages,
        rejected_ranges=batch.rejected_ranges,
    )
