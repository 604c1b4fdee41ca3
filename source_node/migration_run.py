"""One migration at the source: a thread that feeds the machine with facts.

Rule 1: one thread does everything; other threads (gRPC, balloon device, cancel) only post events.
Rule 2: reading and sending is the page stream's; this thread is always free for the next event.
Rule 3: an error of our own is a reason to bring the guest back, as long as that is possible.
Rule 4: however it ends, migration_ended is told, once; what could not be measured is left out and said.
Rule 5: a wish to cancel goes before every fact that waits, and is answered by this thread, with what came of it:
        whoever asks from outside sees a phase that may be over before the wish is looked at.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from host.clock import now_ns
from host.errors import JournalConflict
from migration import commands as do
from migration import events as told
from migration.errors import RemoteProtocolError
from migration.handover import LastStop
from migration.model import Conditions
from migration.pages import PAGE_BYTES
from migration.progress import Standing, outlook
from migration.source_machine import SourceMachine
from migration.source_phases import SourcePhase
from source_node.farewells import mark
from source_node.shell import SourceShell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from host.balloon_server import HintBatch
    from host.context import HostContext
    from source_node.order import Order

PROGRESS_PERIOD_NS = 100_000_000
# The thread looks at a wish within a millisecond, unless it waits for its guest agent, for a destination that does
# not answer a farewell, or at a point.
CANCEL_ANSWER_S = 2.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Wish:
    """Somebody wants the migration cancelled; `answer`: (whether it is, the phase in which that was looked at)."""

    reason: str
    answer: Future[tuple[bool, str]] = field(default_factory=Future)


class MigrationRun:
    """Begins with `start`; ends with the event migration_ended."""

    def __init__(self, host: HostContext, order: Order, on_unheard: Callable[[], None]) -> None:
        self.order = order
        self._on_unheard = on_unheard  # called when the destination did not hear how it ended
        self._host = host
        self._machine = SourceMachine()
        # bounded: phases, hint batches of four times RAM, Cancel calls
        self._events: queue.SimpleQueue[told.SourceEvent | None] = queue.SimpleQueue()
        # bounded: Cancel calls; each wakes the thread by a None in `_events`
        self._wishes: deque[Wish] = deque()
        # bounded: what one event posts; it goes before what is queued
        self._first: deque[told.SourceEvent] = deque()
        self._shell = SourceShell(
            host, order, self._machine, post=self._events.put, post_first=self._first.appendleft
        )
        self._progress_ns = 0
        self._progress_bytes = 0
        self._finished = False
        self._thread = threading.Thread(target=self._main, name="migration", daemon=True)

    # -- from other threads --------------------------------------------------------------------

    def start(self) -> None:
        """Begin, in a thread of its own."""
        order = self.order
        pages = self._host.guest.ram.pages if self._host.guest.ram is not None else 0
        self._first.append(
            told.MigrationRequested(
                order.key, pages, order.skip, order.limits, order.hint_wait_ms, order.rehearsal
            )
        )
        self._thread.start()

    def take_up(self, image_digest: int) -> None:
        """Go on with an attempt that was COMMITTING when this host's process ended: ask until answered."""
        self._shell.reach_again(self.order.key)
        self._first.append(told.CommitPending(self.order.key, image_digest))
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    @property
    def last_stop(self) -> LastStop:
        """What the next stop on this host is expected to take, from this one: what went wrong says nothing."""
        measured = self._shell.watch.measured_ms()
        if self._machine.link.count or not measured:
            return self.order.last_stop
        return LastStop(self.order.peer, {**self.order.last_stop.towards(self.order.peer), **measured})

    @property
    def ended(self) -> bool:
        """Whether the thread has done everything."""
        return self._finished or (self._thread.ident is not None and not self._thread.is_alive())

    def cancel(self, reason: str) -> tuple[bool, str]:
        """Ask it to stop; (whether it does because of that, the phase in which the wish was looked at).

        Of a thread that is busy beyond CANCEL_ANSWER_S it is what the phase promises: the wish is next.
        """
        wish = Wish(reason)
        self._wishes.append(wish)
        self._events.put(None)
        try:
            # Of one that has finished nobody may look any more; what was looked at has its answer at once.
            return wish.answer.result(0 if self._finished else CANCEL_ANSWER_S)
        except TimeoutError:
            return self._machine.reversible, self._machine.phase.name

    def resolve(self, answer: told.Answer, reason: str) -> bool:
        """What the destination can never answer, said by an operator; False when nobody waits for it now."""
        if self._machine.phase is not SourcePhase.COMMITTING:
            return False
        self._events.put(told.CommitAnswered(answer, reason))
        return True

    def _on_hints(self, batch: HintBatch) -> None:
        self._events.put(batch.reported())

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
            hint_rule=self._shell.hint_rule.name,
            rehearsal=order.rehearsal,
        )
        self._shell.watch.requested_ns = now_ns()
        self._host.hints.listen(self._on_hints)
        self._host.guest.listen_for_loss(lambda why: self._events.put(told.HostFailed(why)))
        outcome = do.EndMigration("failed", "internal error, see the node's log")
        try:
            while not self._machine.ended:
                event = self._next_event()
                if isinstance(event, Wish):
                    self._look_at(event)
                elif event is not None:
                    self._feed_or_turn_back(event)
            outcome = self._shell.outcome or outcome
        except (JournalConflict, sqlite3.Error) as error:
            log.exception("journal_failed")
            outcome = do.EndMigration("failed", f"the journal forbids it: {error}")
        except Exception:
            log.exception("migration_failed", phase=self._machine.phase.name)
        finally:
            self._finish(outcome)

    def _look_at(self, wish: Wish) -> None:
        effective, phase = self._machine.reversible, self._machine.phase.name
        try:
            self._feed_or_turn_back(told.CancelRequested(wish.reason))
        finally:
            wish.answer.set_result((effective, phase))

    def _feed_or_turn_back(self, event: told.SourceEvent) -> None:
        try:
            self._feed(event)
        except (JournalConflict, sqlite3.Error):
            raise
        except RemoteProtocolError as error:
            if not self._machine.reversible:
                raise
            self._first.append(told.PeerLost(f"the destination broke the protocol: {error}"))
        except Exception as error:
            if not self._machine.reversible or isinstance(event, told.HostFailed):
                raise
            log.exception("machine_failed", told=type(event).__name__)
            self._first.append(told.HostFailed(f"internal error: {type(error).__name__}: {error}"))

    def _feed(self, event: told.SourceEvent) -> None:
        if isinstance(event, told.HintsReported):
            self._shell.hinted(event)
        for command in self._machine.handle(event, now_ns()):
            self._shell.execute(command)

    def _next_event(self) -> told.SourceEvent | Wish | None:
        """The next fact; None when a moment passed without one: timers and progress are looked at then."""
        if self._first:
            return self._first.popleft()
        if self._wishes:
            return self._wishes.popleft()
        instant, timers = now_ns(), self._shell.timers
        for timer, at_ns in timers.items():
            if at_ns <= instant:
                del timers[timer]
                return told.TimerFired(timer)
        self._progress(instant)
        until_ns = min([*timers.values(), instant + PROGRESS_PERIOD_NS])
        try:
            return self._events.get(timeout=(until_ns - instant) / 1e9)
        except queue.Empty:
            return None

    def _progress(self, instant: int) -> None:
        rounds, stream = self._machine.round_set, self._shell.stream
        sending = self._machine.phase in {SourcePhase.SENDING, SourcePhase.FINAL_SENDING}
        if (
            not sending
            or rounds is None
            or stream is None
            or instant - self._progress_ns < PROGRESS_PERIOD_NS
        ):
            return
        since_ns, self._progress_ns = self._progress_ns or instant - PROGRESS_PERIOD_NS, instant
        self._shell.wire.calibrate(stream)
        ledger, batch = rounds.ledger, stream.batch_sent
        payload_bytes = self._shell.wire.payload_bytes + ledger.payload_bytes + batch.payload_bytes
        sent, zero = ledger.sent_pages + batch.data_pages, ledger.zero_pages + batch.zero_pages
        book = self._machine.book
        pages_per_s = (sent + zero) * 1e9 / max(instant - book.round_started_ns, 1)
        standing = Standing(
            samples=book.samples,
            round_index=rounds.index,
            remaining_pages=rounds.remaining,
            round_ms=(instant - book.round_started_ns) / 1e6,
            elapsed_ms=(instant - self._shell.watch.requested_ns) / 1e6,
            pages=rounds.pages,
            paused=self._machine.phase is SourcePhase.FINAL_SENDING,
        )
        self._host.events.add(
            "progress",
            round=rounds.index,
            sent_pages=sent,
            zero_pages=zero,
            skipped_pages=ledger.skipped_pages,
            remaining_pages=rounds.remaining,
            payload_bytes=payload_bytes,
            rate_bytes_per_s=round((payload_bytes - self._progress_bytes) * 1e9 / (instant - since_ns)),
            **outlook(standing, Conditions(pages_per_s * PAGE_BYTES, self.order.limits)).fields(),
        )
        self._progress_bytes = payload_bytes

    # -- the end -------------------------------------------------------------------------------

    def _finish(self, outcome: do.EndMigration) -> None:
        """Release everything, write what a judge will ask for, tell the outcome."""
        shell, host = self._shell, self._host
        shell.watch.ended_ns = now_ns()
        host.hints.listen(None)
        if shell.watch.decided_ns and outcome.outcome != "completed":
            # COMMITTED was answered: whatever went wrong afterwards, the destination has the guest.
            outcome = do.EndMigration("completed", f"the destination runs the guest; but {outcome.reason}")
        elif outcome.outcome != "completed" and not host.guest.found_again():
            # Its RAM and its vCPU state were in that process: there is nothing left that anybody could run.
            outcome = do.EndMigration("guest_lost", outcome.reason, do.Cause.HOST)
        missing: list[str] = []
        if outcome.outcome not in ("completed", "guest_lost"):
            # Whatever kept the machine from its last orders: a guest that stays here is not left starved.
            _or_missing("throttle lifted", shell.lift_throttle, missing)
            _or_missing("hints done", shell.say_done, missing)
        byte_counts = _or_missing("bytes", shell.byte_counts, missing) or {}
        _or_missing("release", shell.release, missing)
        if outcome.outcome == "completed":
            _or_missing("artefacts", shell.write_evidence, missing)
        host.events.add("node_resources", **host.resources.fields())
        host.guest.listen_for_loss(None)  # from here on another agent may be taken in
        self._finished = True  # first: whoever hears of the end may begin the next migration
        self._answer_late_wishes()
        stop = self._machine.stop_decided
        host.events.add(
            "migration_ended",
            outcome=outcome.outcome,
            reason=outcome.reason,
            cause=outcome.cause.value,
            downtime_ms_estimated=stop.downtime_ms_estimated if stop is not None else None,
            downtime_parts_ms_estimated=rounded(stop.downtime_parts_ms) if stop is not None else {},
            recoveries=self._machine.link.to_dict(),
            throttle=shell.throttle.fields(),
            **shell.watch.times(),
            hints=self._machine.ledger.to_dict(),
            bytes=byte_counts,
            **(shell.stream.report() if shell.stream is not None else {}),
            artefacts=shell.artefacts,
            missing=missing,
            engine={"tracker": self.order.tracker, "tracker_reason": self.order.tracker_reason},
        )
        try:
            mark(host, self.order.key, told=True, heard=shell.heard)
        except (JournalConflict, sqlite3.Error):  # told once more, by the next process
            log.exception("end_not_marked")
        if not shell.heard:
            self._on_unheard()

    def _answer_late_wishes(self) -> None:
        """Those that came after the last event that was looked at; who comes later sees that it has finished."""
        while self._wishes:
            self._wishes.popleft().answer.set_result((False, self._machine.phase.name))


def rounded(parts_ms: Mapping[str, float]) -> dict[str, float]:
    """As figures of the event."""
    return {name: round(ms, 3) for name, ms in parts_ms.items()}


def _or_missing(what: str, take: Callable[[], Any], missing: list[str]) -> Any:
    """What `take` gives; when it cannot, the reason goes to the log and to `missing`, and the end goes on."""
    try:
        return take()
    except Exception as error:
        log.exception("not_measured", what=what)
        missing.append(f"{what}: {' '.join(str(error).split())}")
        return None
