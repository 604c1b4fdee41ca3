"""Carries the source machine's commands out on this host, and tells what came of them.

Rule 1: commands are carried out by the migration's one thread; what other threads learn, they only post.
Rule 2: a command that fails is an event (HostFailed, LinkLost, PeerLost) with its reason in one line; what is not
        foreseen is logged with its traceback and treated as HostFailed. Only the journal is beyond that: without
        it nothing may be decided, and its errors go to the caller.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, assert_never

import grpc
import structlog

from host.ballooned import ballooned_for_good, ballooned_holes, pack
from host.clock import now_ns
from host.errors import AgentError, AgentLost, DeviceNotReady, HostError, JournalConflict
from host.resources import cpu_seconds
from host.trackers import DirtyTracker, HashTracker, UffdTracker
from migration import commands as do
from migration import events as told
from migration.codec import image_digest
from migration.errors import ProtocolError, RemoteProtocolError
from migration.handover import expected
from migration.pb import migration_pb2
from migration.source_phases import SourcePhase
from source_node.accounting import Stopwatch
from source_node.artefacts import write_artefacts
from source_node.attempt_note import AttemptNote
from source_node.destination import Destination, id_message
from source_node.farewells import tell_all, unheard
from source_node.hint_log import HintLog
from source_node.hint_rule import SafeRule, UnsafeClearDirtyLogAtHint
from source_node.packer import PackingOrder
from source_node.page_reader import PageReader
from source_node.reached import reach_after, reach_before
from source_node.throttling import GuestThrottle
from source_node.wire_account import WireAccount

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.context import HostContext
    from migration.identity import AttemptKey
    from migration.source_machine import SourceMachine
    from source_node.hint_rule import HintRule
    from source_node.order import Order
    from source_node.page_stream import PageStream

STREAM_CLOSE_TIMEOUT_S = 10.0  # everything is acknowledged by then: only the calls' ends are missing

log = structlog.get_logger()


class SourceShell:
    """One attempt's hands. `post` queues an event; `post_first` puts it before everything that is queued."""

    def __init__(
        self,
        host: HostContext,
        order: Order,
        machine: SourceMachine,
        *,
        post: Callable[[told.SourceEvent], None],
        post_first: Callable[[told.SourceEvent], None],
    ) -> None:
        assert host.guest.ram is not None, "a migration needs a guest"
        self.timers: dict[told.Timer, int] = {}  # -> when, in ns
        self.watch = Stopwatch()
        self.wire = WireAccount(order.dest_address)
        self.stream: PageStream | None = None
        self.outcome: do.EndMigration | None = None
        self.artefacts: list[str] = []
        self.heard = True  # whether the destination, if there is one, knows the outcome
        self._host = host
        self._order = order
        self._machine = machine
        self._post = post
        self._post_first = post_first
        self._ram = host.guest.ram
        self._destination: Destination | None = None
        self._reader: PageReader | None = None
        self._tracker: DirtyTracker | None = None
        self._hint_log = HintLog(host.events)
        self.hint_rule = self._chosen_hint_rule()
        self.throttle = GuestThrottle(host.guest)
        self._prepare = migration_pb2.PrepareRequest()
        self._vcpu_state = b""
        self._last_round: dict[str, object] = {}
        self._hints_asked = False  # and the guest was not told DONE yet: it keeps its hinted pages back

    def hinted(self, report: told.HintsReported) -> None:
        """Called with every report before the machine sees it."""
        self._hint_log.reported(report)
        self.hint_rule.hinted(report)

    def reach_again(self, key: AttemptKey) -> None:
        """Have a channel to the destination without opening an attempt: this one is COMMITTING already."""
        self._destination = self._peer_of(key)

    def _peer_of(self, key: AttemptKey) -> Destination:
        order, trust = self._order, self._host.trust
        return Destination(
            order.dest_address, key, self._post, server_name=order.dest_server_name, trust=trust
        )

    def _chosen_hint_rule(self) -> HintRule:
        scanner = self._host.guest.scanner
        if not self._order.unsafe_clear_dirty_log_at_hint:
            return SafeRule()
        assert scanner is not None, (
            "hints need the kernel's tracking: it was probed when the order was checked"
        )
        return UnsafeClearDirtyLogAtHint(scanner.forget)

    @property
    def _peer(self) -> Destination:
        assert self._destination is not None, "no destination was opened"
        return self._destination

    @property
    def _pages(self) -> PageStream:
        assert self.stream is not None, "no page stream was opened"
        return self.stream

    @property
    def _ram_reader(self) -> PageReader:
        assert self._reader is not None, "tracking was not started"
        return self._reader

    # -- told by the page stream -----------------------------------------------------------------

    def pages_sent(self, sent: told.PagesSent) -> None:
        """A batch left."""
        self._post(sent)

    def all_acknowledged(self) -> None:
        """Everything sent is stored."""
        self._post(told.AllAcknowledged())

    def stream_lost(self, reason: str, *, refused: bool) -> None:
        """No more pages can go, for ever or until the link is back."""
        self._post(told.PeerLost(reason) if refused else told.LinkLost(reason))

    # -- commands ------------------------------------------------------------------------------

    def execute(self, command: do.SourceCommand) -> None:
        """Carry one command out. Raises JournalConflict and sqlite3.Error; the rest becomes an event."""
        try:
            reach_before(self._host.points, command, self._machine)
            self._carry_out(command)
            reach_after(self._host.points, command)
        except (JournalConflict, sqlite3.Error):
            raise
        except RemoteProtocolError as error:
            self._post(told.PeerLost(f"the destination broke the protocol: {error}"))
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
            case do.ResumeDestination():
                self._peer.resume()
            case do.ResumeStreams(stored_below):
                self._post(told.StreamsResumed(len(self._pages.resume(stored_below))))
            case do.ThrottleGuest(percent):
                self.throttle.set(percent)
                self._host.events.add("throttled", percent=percent)
            case do.StartTracking():
                self._start_tracking()
            case do.Harvest():
                self._harvest()
            case do.OpenHints():
                self._open_hints()
            case do.CloseHints():
                closed = told.HintsClosed(self._host.balloon.close_hints().reported())
                self._hint_log.closed(closed.last)
                self.hint_rule.hinted(closed.last)
                self._post(closed)
            case do.EndHints():
                self._end_hints()
            case do.ArmTimer(timer, delay_ms):
                self.timers[timer] = now_ns() + delay_ms * 1_000_000
            case do.DisarmTimer(timer):
                self.timers.pop(timer, None)
            case do.SendPages(round_index, pfns):
                self._pages.send(round_index, pfns)
            case do.AwaitAcknowledgements():
                round_set = self._machine.round_set
                self._pages.await_acknowledgements(round_set.index if round_set else 0)
                if self._machine.phase is SourcePhase.FINAL_DRAINING and not self._order.rehearsal:
                    # It does not change while the guest is paused; asked for while the last pages cross.
                    self._vcpu_state = self._host.guest.link.save()
            case do.PauseGuest():
                self._pause()
            case do.SaveGuest(rehearsal):
                self._save(rehearsal)
            case do.SendPrepare():
                self._peer.prepare(self._prepare)
                self._tell_last_round()
            case do.SendCommit(_, digest):
                self._peer.commit(digest)
            case do.KeepEvidence():
                self._keep_evidence()
            case do.ResumeGuest(key):
                self._resume(key)
            case do.FreezeGuest():
                self._given_away()
            case do.AbortDestination(_, reason):
                self._abandon(reason)
            case do.ForgetDestination():
                if problem := self._peer.forget():
                    self.heard = False
                    self._host.events.add("forget_unheard", reason=problem)
            case do.Note(name, fields):
                self._note(name, fields)
            case do.EndMigration():
                self.outcome = command
            case _ as never:
                assert_never(never)

    def _record(self, command: do.RecordState) -> None:
        journal, key, state = self._host.journal, command.key, command.state
        detail = AttemptNote(self._order.peer, command.reason).text
        if state is told.Recorded.STARTED:
            journal.begin(key, "source", state.value, detail=detail)
        elif state is told.Recorded.COMPLETED:
            journal.move(key, "source", {"COMMITTING"}, state.value, detail=detail)
        elif state is told.Recorded.COMMITTING:
            self.watch.passed("prepare", now_ns())
            digest = self._prepare.image_digest
            journal.move(key, "source", {"STARTED"}, state.value, digest=digest, detail=detail)
        else:
            journal.move(key, "source", {"STARTED", "COMMITTING"}, state.value, detail=detail)
        self._post(told.StateRecorded(state))

    def _open(self, key: AttemptKey) -> None:
        # What an earlier attempt left there would be in the way: an Abort that was not heard is repeated first.
        tell_all(self._host, unheard(self._host, self._order.peer))
        self.wire.start()
        if self._destination is None:
            self._destination = self._peer_of(key)
        order = self._order
        self._destination.open(
            self._ram.memory_bytes, order.integrity, order.streams, order.limits.link_timeout_ms
        )

    def _start_tracking(self) -> None:
        self._reader = PageReader(
            self._ram,
            incarnation=self._peer.incarnation,
            attempt=self._order.key.attempt,
            detects_zero=self._order.skip.detects_zero,
        )
        self.stream = self._peer.page_stream(
            self,
            self._reader,
            streams=self._order.streams,
            bytes_per_second=self._order.limits.bandwidth,
            packing=PackingOrder(self._order.compression, self._order.delta_cache_bytes),
        )
        log_, scanner = self._host.device_log, self._host.guest.scanner
        if self._order.tracker == "uffd":
            assert scanner is not None, "the tracker was probed when the order was checked"
            self._tracker = UffdTracker(scanner, log_, self._host.balloon.ballooned)
        else:
            self._tracker = HashTracker(
                self._ram, self._reader.sent_hashes, log_, self._host.balloon.ballooned
            )
        self._tracker.start()
        self._reader.find_holes()
        if self._order.limits.throttle is not None:
            self.throttle.begin()
        self.watch.first_round_ns = now_ns()
        handover = expected(self._order.last_stop.towards(self._order.peer), self.wire.round_trip_ms())
        self._post(told.TrackingStarted(ballooned_holes(self._host.balloon, self._ram), handover))

    def _open_hints(self) -> None:
        round_set = self._machine.round_set
        index = round_set.index if round_set else 0
        try:
            command_id = self._host.balloon.open_hints()
        except DeviceNotReady as error:
            # A driver that is away for a moment costs its hints, not the migration.
            self._host.events.add("hints_unavailable", round=index, reason=str(error))
            self._post_first(told.HintsReported(0, stopped=True))
            self._post_first(told.HintsOpened(0))
            return
        self._hints_asked = True
        self._hint_log.opened(command_id, index)
        self._post_first(told.HintsOpened(command_id))  # before what the guest answered meanwhile

    def _end_hints(self) -> None:
        self._host.balloon.hints_done()
        self._hints_asked = False
        self._host.events.add("hints_done")

    def _harvest(self) -> None:
        assert self._tracker is not None, "tracking was not started"
        started_ns = now_ns()
        dirty = self._tracker.harvest()
        duration_ns = now_ns() - started_ns
        if self._machine.phase is SourcePhase.FINAL_HARVESTING:
            self.watch.passed("harvest", now_ns())
        self._host.events.add("harvested", duration_ms=duration_ns / 1e6, dirty_pages=dirty.count)
        self._post(told.Harvested(dirty, self._tracker.left_out))

    def _pause(self) -> None:
        self.watch.pause_ordered(now_ns())
        self._host.guest.link.pause()
        self._host.balloon.serve_out()
        self.watch.passed("pause", now_ns())
        self._host.events.add("guest_paused", downtime_starts_ns=self.watch.pause_ordered_ns)
        self._post(told.GuestPaused())

    def _save(self, rehearsal: bool) -> None:
        self.watch.passed("send", now_ns())
        self._pages.half_close()  # the destination ends the calls while we look at the device
        vcpu_state = b"" if rehearsal else self._vcpu_state
        device = self._host.balloon.device_state()
        if not self._pages.close(STREAM_CLOSE_TIMEOUT_S):
            # Every chunk is acknowledged: what became of the destination, or of the link, Prepare will show.
            self._pages.cancel()
            self._host.events.add("streams_not_ended", timeout_s=STREAM_CLOSE_TIMEOUT_S)
        assert self._tracker is not None, "tracking was not started"
        held = self._host.balloon.ballooned(self._ram.pages)
        ballooned = ballooned_for_good(held, self._ram_reader.sent_hashes, self._tracker.left_out)
        state = migration_pb2.DeviceState(
            features=device.features,
            num_pages=device.num_pages,
            actual=device.actual,
            poison_value=device.poison_value,
            next_command_id=device.next_command_id,
            ring_bases=device.ring_bases,
            hints_open=device.hints_open,
            ballooned=pack(ballooned),
        )
        digest = image_digest(
            self._ram_reader.sent_hashes, vcpu_state, state.SerializeToString(deterministic=True)
        )
        sent = self._machine.ledger
        self._prepare = migration_pb2.PrepareRequest(
            id=id_message(self._order.key),
            incarnation=self._peer.incarnation,
            image_digest=digest,
            vcpu_state=vcpu_state,
            device=state,
            chunks=self._pages.sent_chunks,
            ledger=migration_pb2.Ledger(
                data_pages=sent.sent_pages, zero_pages=sent.zero_pages, skipped_pages=sent.skipped_pages
            ),
            rehearsal=rehearsal,
        )
        self.watch.passed("save", now_ns())
        self._post(told.GuestSaved(digest))

    def _keep_evidence(self) -> None:
        self.watch.passed("prepare", now_ns())
        self.artefacts = write_artefacts(
            self._host, self._ram, self._ram_reader.sent_hashes, self._order.integrity
        )
        self.watch.passed("verify", now_ns())
        self._post(told.EvidenceKept())

    def _resume(self, key: AttemptKey) -> None:
        """The guest must not stay paused because its link broke: ask until it answers or its process is gone."""
        guest = self._host.guest
        while True:
            try:
                guest.link.resume(key.guest_epoch)
            except AgentLost:
                if not guest.found_again():
                    raise
                continue
            break
        if self.artefacts:
            self.watch.rehearsed(now_ns(), verify_ns=self._peer.verify_ns)
        self._post(told.GuestResumed())

    def _given_away(self) -> None:
        peer = self._peer
        self.watch.decided(now_ns(), verify_ns=peer.verify_ns, resume_ns=peer.resume_ns)
        self._host.events.add("committed")
        try:
            self._host.guest.link.freeze()
        except (AgentError, AgentLost) as error:
            # It is paused, and its epoch is given away: nothing of ours resumes it.
            self._host.events.add("freeze_failed", reason=str(error))

    def _abandon(self, reason: str) -> None:
        if self.stream is not None:
            self.stream.cancel()
        if self._destination is not None and (problem := self._destination.abort(reason)):
            self.heard = False
            self._host.events.add("abort_unheard", reason=problem)

    def _note(self, name: str, fields: dict[str, object]) -> None:
        if fields.get("decision") == "handover":
            # The guest stands still, and reading the connection's counters takes milliseconds: told a little
            # later, while the destination is at work.
            self._last_round = fields
        else:
            self._tell(name, fields)

    def _tell_last_round(self) -> None:
        fields, self._last_round = self._last_round, {}
        if fields:
            self._tell("round_ended", fields)

    def _tell(self, name: str, fields: dict[str, object]) -> None:
        if name == "round_ended":
            fields |= self.wire.round_ended(self._machine.ledger, self._pages, self._peer)
            fields["hint_ranges"] = self._hint_log.ranges
        if name in {"round_started", "round_ended"}:
            fields["cpu_seconds"] = cpu_seconds()  # of this process so far: what a round cost is a difference
        self._host.events.add(name, **fields)

    # -- the end -------------------------------------------------------------------------------

    def byte_counts(self) -> dict[str, object]:
        """The `bytes` of the result, while the connection can still be asked."""
        self._tell_last_round()  # of an attempt that ended between its last page and Prepare
        return self.wire.totals(self._machine.ledger, self.stream, self._destination)

    def lift_throttle(self) -> None:
        """Where the machine cannot any more: without a journal its orders are not carried out. Idempotent."""
        if self.throttle.percent:
            self.throttle.set(0)
            self._host.events.add("throttled", percent=0)

    def say_done(self) -> None:
        """As `lift_throttle`: a guest that was asked for hints has its pages back. Idempotent."""
        if self._hints_asked:
            self._end_hints()

    def release(self) -> None:
        """Close what was opened. Idempotent."""
        if self.stream is not None:
            self.stream.cancel()
        if self._destination is not None:
            self._destination.close()
        if self._tracker is not None:
            self._tracker.stop()

    def write_evidence(self) -> None:
        """What a judge will ask for after COMMITTED; an attempt taken up after a restart knows no sent pages."""
        sent = self._reader.sent_hashes if self._reader is not None else None
        self.artefacts = write_artefacts(self._host, self._ram, sent, self._order.integrity)
