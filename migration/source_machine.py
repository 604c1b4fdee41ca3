"""The source of a migration: `(state, event, now) -> commands`, no I/O (DESIGN 3.1, 3.3, 3.4).

Rule 1: a command id is issued only after the round's set was harvested, and the next harvest happens only
        after the id was closed and the queue drained. A hint touches that one set, never the dirty log.
Rule 2: hints come first: a round waits for the guest's STOP, for a bounded time, before it sends anything.
Rule 3: the end is pause, rings stopped, last harvest, last pages, state, Prepare - in this order.
Rule 4: before COMMITTING is recorded every failure ends in ABORTED, recorded before the guest runs again.
Rule 5: after COMMITTING is recorded only the destination's answer decides; "unknown" is no answer.
Rule 6: however an attempt ends at the source, a guest that was asked for hints is told DONE.
Rule 7: while the link is lost nothing is sent and no guest is paused; the rest goes on. A guest that stood still
        before stands still, until the link is back or its time or the migration's is over.
Rule 8: a throttle is in force only while pages are being sent to a destination that can be reached: it is lifted
        when the guest is paused, when the link is lost, and before an attempt ends.
Rule 9: a rehearsal goes the same way up to Prepare, which only verifies, and then turns back like any attempt that
        cannot go on: ABORTED is recorded before the guest runs. It never comes near COMMITTING.

The books of the rounds are in round_book.py, what a lost link asks for in link_recovery.py, why
an attempt turns back, and its last orders, in turning_back.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from migration import commands as do
from migration import events as told
from migration.commands import Cause, SourceCommand
from migration.errors import LocalProtocolError
from migration.events import Answer, Recorded, Skip, SourceEvent, Timer
from migration.identity import AttemptKey
from migration.link_recovery import LinkRecovery
from migration.page_bits import PageBits
from migration.round_book import BATCH_PAGES, RoundBook
from migration.rounds import Decision, DecisionKind, Limits, decide
from migration.source_phases import (
    FINAL_PHASES,
    HINT_PHASES,
    RECOVERIES,
    REVERSIBLE_PHASES,
    TRANSITIONS,
    Recovery,
    SourcePhase,
    means_nothing,
)
from migration.turning_back import Turn, turn_of

if TYPE_CHECKING:
    from migration.ledger import MigrationLedger
    from migration.round_set import RoundSet

COMMIT_RETRY_MS = 500  # the guest stands still meanwhile: ask often, but do not hammer a dead host
CANCEL_REFUSED = do.Note("cancel_refused", {"reason": "only the destination can decide after COMMITTING"})

P = SourcePhase


class SourceMachine:
    """One attempt. `handle` is the only way in, its commands the only way out."""

    def __init__(self, *, batch_pages: int = BATCH_PAGES) -> None:
        self.phase = P.IDLE
        self.book = RoundBook(batch_pages)
        self.stop_decided: Decision | None = None  # to pause the guest for good, with what it was to cost
        self._handlers: dict[SourcePhase, Callable[[SourceEvent], list[SourceCommand]]] = {
            P.IDLE: self._on_idle,
            P.OPENING: self._on_opening,
            P.ARMING: self._on_arming,
            P.HINTING: self._on_hinting,
            P.SENDING: self._on_sending,
            P.DRAINING: self._on_draining,
            P.CLOSING_HINTS: self._on_closing_hints,
            P.HARVESTING: self._on_harvesting,
            P.PAUSING: self._on_pausing,
            P.FINAL_HARVESTING: self._on_final_harvesting,
            P.FINAL_SENDING: self._on_sending,
            P.FINAL_DRAINING: self._on_final_draining,
            P.SAVING: self._on_saving,
            P.PREPARING: self._on_preparing,
            P.KEEPING_EVIDENCE: self._on_keeping_evidence,
            P.RECORDING: self._on_recording,
            P.COMMITTING: self._on_committing,
            P.COMPLETING: self._on_completing,
            P.ABORTING: self._on_aborting,
            P.RESUMING: self._on_resuming,
        }
        self._request: told.MigrationRequested
        self.link = LinkRecovery(AttemptKey("", 0, 0), Limits())
        self._throttle_percent = 0  # that the guest was told last
        self._pending: PageBits
        self._image_digest = 0
        self._question: do.SendPrepare | None = None  # once it was asked
        self._commits_unanswered = 0
        self._pause_ordered = False
        self._all_stored = False  # and the guest is paused: nothing will follow
        self._hints_ordered = False
        self._hints_open = False
        self._command_id: int | None = None  # of the open report, once it was issued
        self._turn = Turn(P.FAILED, "", Cause.NONE)
        self._started_ns = 0
        self._now_ns = 0

    # -- the one entrance ----------------------------------------------------------------------

    def handle(self, event: SourceEvent, now_ns: int) -> list[SourceCommand]:
        """Takes one fact, returns the orders that follow from it.

        Raises:
            LocalProtocolError: the shell told something that cannot happen in this phase.
        """
        self._now_ns = now_ns
        if isinstance(event, told.HintsReported) and not self._counts(event):
            # The guest may answer late, or an earlier attempt's id, at any time: that is never our error.
            self.ledger.count_stale(event.stale_pages + int(event.page_count.sum()))
            self.ledger.count_rejected(event.rejected_ranges)
            return []
        allowed = TRANSITIONS[self.phase].get(type(event))
        if allowed is None:
            if means_nothing(self.phase, type(event)):
                return []
            raise LocalProtocolError(f"{type(event).__name__} in phase {self.phase.name}")
        before = self.phase
        commands = self._at_any_time(event) if before in REVERSIBLE_PHASES else None
        if commands is None:
            commands = self._handlers[before](event)
        assert self.phase in allowed, (before, type(event).__name__, self.phase)
        return commands

    def _counts(self, report: told.HintsReported) -> bool:
        return self.phase in HINT_PHASES and self._hints_open and report.command_id == self._command_id

    @property
    def reversible(self) -> bool:
        """Whether a cancellation would still bring the guest back by itself."""
        return self.phase in REVERSIBLE_PHASES

    @property
    def ended(self) -> bool:
        """Whether nothing follows any more."""
        return self.phase in FINAL_PHASES

    @property
    def ledger(self) -> MigrationLedger:
        """The rounds that ended, added up."""
        return self.book.ledger

    @property
    def round_set(self) -> RoundSet | None:
        """The set being sent, for progress; None before round 1."""
        return self.book.round

    # -- beginning -----------------------------------------------------------------------------

    def _on_idle(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.CommitPending):
            # What the attempt was asked for no longer matters; if it turns back, the guest is paused here.
            self._request = told.MigrationRequested(event.key, 0, Skip.NONE, Limits(), 0)
            self._image_digest = event.image_digest
            self._pause_ordered = self._hints_ordered = True
            self.phase = P.COMMITTING
            return [do.SendCommit(event.key, event.image_digest)]
        assert isinstance(event, told.MigrationRequested)
        self._request = event
        self.link = LinkRecovery(event.key, event.limits)
        self._started_ns = self._now_ns
        self.phase = P.OPENING
        commands: list[SourceCommand] = [do.RecordState(event.key, Recorded.STARTED)]
        if math.isfinite(event.limits.timeout_ms):
            commands.append(do.ArmTimer(Timer.MIGRATION, math.ceil(event.limits.timeout_ms)))
        return [*commands, do.OpenDestination(event.key)]

    def _on_opening(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.DestinationOpened):
            return []
        self.phase = P.ARMING
        return [*self.link.restored(self._now_ns), do.StartTracking()]

    def _on_arming(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.TrackingStarted):
            return []
        self.book.handover = event.handover
        return self._begin_round(PageBits.full(self._request.pages), event.ballooned)

    # -- rounds --------------------------------------------------------------------------------

    def _begin_round(self, candidates: PageBits, ballooned: PageBits | None) -> list[SourceCommand]:
        hints = self._request.skip.uses_hints
        note = self.book.open(candidates, ballooned, self._now_ns, hints=hints)
        if not hints:
            return [note, *self._send_next(P.SENDING, P.DRAINING)]
        self.phase = P.HINTING
        self._hints_ordered = self._hints_open = True
        self._command_id = None
        return [note, do.OpenHints(), do.ArmTimer(Timer.HINT_WAIT, self._request.hint_wait_ms)]

    def _on_hinting(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.HintsOpened):
            self._command_id = event.command_id
            return []
        if isinstance(event, told.HintsReported):
            self.book.hint(event)
            if not event.stopped:
                return []
            return [do.DisarmTimer(Timer.HINT_WAIT), *self._send_next(P.SENDING, P.DRAINING)]
        if isinstance(event, told.TimerFired) and event.timer is Timer.HINT_WAIT:
            return self._send_next(P.SENDING, P.DRAINING)
        return []

    def _send_next(self, sending: SourcePhase, drained: SourcePhase) -> list[SourceCommand]:
        if self.phase not in (sending, drained):
            self.book.begin_sending(self._now_ns)
        self.phase = sending
        if not self.link.up:
            return []  # goes on when the streams are open again
        pfns = self.book.take()
        if len(pfns) == 0:
            self.phase = drained
            return [do.AwaitAcknowledgements()]
        return [do.SendPages(self.book.current.index, pfns)]

    def _send_on(self) -> list[SourceCommand]:
        """The next batch of the round under way, whichever it is."""
        if self.phase in (P.FINAL_SENDING, P.FINAL_DRAINING):
            return self._send_next(P.FINAL_SENDING, P.FINAL_DRAINING)
        return self._send_next(P.SENDING, P.DRAINING)

    def _on_sending(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.HintsReported):
            self.book.hint(event)
            return []
        if isinstance(event, told.PagesSent):
            self.book.sent(event)
            return self._send_on()
        return []

    def _on_draining(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.HintsReported):
            self.book.hint(event)
            return []
        if not isinstance(event, told.AllAcknowledged):
            return []
        if self._hints_open:
            self.phase = P.CLOSING_HINTS
            return [do.CloseHints()]
        return self._harvest()

    def _harvest(self) -> list[SourceCommand]:
        self.phase = P.HARVESTING
        self.book.harvest_ordered(self._now_ns)
        return [do.Harvest()]

    def _on_closing_hints(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.HintsClosed):
            self.book.hint(event.last)
            self._hints_open = False
            return self._harvest()
        if isinstance(event, told.HintsReported):
            self.book.hint(event)
        return []

    def _on_harvesting(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.Harvested):
            return []
        dirty = PageBits.of(event.dirty)
        self.book.harvested(self._now_ns)
        totals = self.book.finish(dirty, self._now_ns)
        stats = self.book.stats(dirty, self._now_ns - self._started_ns, link_up=self.link.up)
        decision = decide(stats, self._request.limits)
        note = self.book.note(totals, stats.remaining_pages, decision, self._now_ns)
        match decision.kind:
            case DecisionKind.NEXT_ROUND:
                self.book.decided(stats, self.book.throttle_percent)
                return [note, *self._begin_round(dirty, event.ballooned)]
            case DecisionKind.THROTTLE:
                self.book.decided(stats, decision.throttle_percent)
                return [
                    note,
                    *self._throttle(decision.throttle_percent),
                    *self._begin_round(dirty, event.ballooned),
                ]
            case DecisionKind.STOP_COPY:
                self._pending = dirty
                self._pause_ordered = True
                self.stop_decided = decision
                self.phase = P.PAUSING
                return [note, do.PauseGuest()]
            case _:
                return [note, *self._abort(P.CANCELLED, decision.reason, Cause.LIMIT)]

    # -- stop and copy -------------------------------------------------------------------------

    def _on_pausing(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.GuestPaused):
            return []
        self.phase = P.FINAL_HARVESTING
        return [*self._throttle(0), do.Harvest()]

    def _on_final_harvesting(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.Harvested):
            return []
        # What is pending may have gone into the balloon since the harvest before: nobody needs it any more.
        note = self.book.open(self._pending | event.dirty, event.ballooned, self._now_ns, hints=False)
        return [note, *self._send_next(P.FINAL_SENDING, P.FINAL_DRAINING)]

    def _on_final_draining(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.AllAcknowledged):
            return []
        self._all_stored = True
        return self._save() if self.link.up else []

    def _save(self) -> list[SourceCommand]:
        totals = self.book.finish(None, self._now_ns)
        self.phase = P.SAVING
        handover = Decision(DecisionKind.HANDOVER, "the guest is paused and every page is sent")
        return [
            self.book.note(totals, 0, handover, self._now_ns),
            do.SaveGuest(self._request.rehearsal),
        ]

    # -- hand-over -----------------------------------------------------------------------------

    def _on_saving(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.GuestSaved):
            return []
        self._image_digest = event.image_digest
        self._question = do.SendPrepare(self._request.key, self._image_digest, self._request.rehearsal)
        self.phase = P.PREPARING
        return [self._question]

    def _on_preparing(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.PrepareAnswered):
            return []
        restored = self.link.restored(self._now_ns)
        wanted = Answer.VERIFIED if self._request.rehearsal else Answer.PREPARED
        if event.answer is not wanted:
            reason = f"the destination could not prepare: {event.reason}"
            return [*restored, *self._abort(P.FAILED, reason, Cause.DESTINATION)]
        if self._request.rehearsal:
            self.phase = P.KEEPING_EVIDENCE
            return [*restored, do.KeepEvidence()]
        self.phase = P.RECORDING
        return [*restored, do.RecordState(self._request.key, Recorded.COMMITTING)]

    def _on_keeping_evidence(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, told.EvidenceKept):
            return []
        return self._abort(P.REHEARSED, "a rehearsal: the guest goes on at the source", Cause.NONE)

    def _on_recording(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, told.CancelRequested):
            return [CANCEL_REFUSED]
        if not isinstance(event, told.StateRecorded) or event.state is not Recorded.COMMITTING:
            return []
        self.phase = P.COMMITTING
        return [do.DisarmTimer(Timer.MIGRATION), do.SendCommit(self._request.key, self._image_digest)]

    def _on_committing(self, event: SourceEvent) -> list[SourceCommand]:
        key = self._request.key
        if isinstance(event, told.CommitAnswered) and event.answer is Answer.COMMITTED:
            self.phase = P.COMPLETING
            return [
                do.DisarmTimer(Timer.COMMIT_RETRY),
                do.FreezeGuest(key),
                do.RecordState(key, Recorded.COMPLETED),
            ]
        if isinstance(event, told.CommitAnswered) and event.answer is Answer.ABORTED:
            return self._abort(P.FAILED, f"the destination gave up: {event.reason}", Cause.DESTINATION)
        if isinstance(event, told.TimerFired):
            retry = event.timer is Timer.COMMIT_RETRY
            return [do.SendCommit(key, self._image_digest)] if retry else []
        if isinstance(event, told.CancelRequested | told.HostFailed):
            return [CANCEL_REFUSED]
        reason = (
            event.reason if isinstance(event, told.CommitAnswered | told.PeerLost | told.LinkLost) else ""
        )
        self._commits_unanswered += 1
        times = self._commits_unanswered
        # Asking goes on for as long as it takes; its history stays short: the 1st, 2nd, 4th, 8th ... time.
        note = (
            [do.Note("commit_unanswered", {"reason": reason, "times": times})]
            if times.bit_count() == 1
            else []
        )
        return [*note, do.ArmTimer(Timer.COMMIT_RETRY, COMMIT_RETRY_MS)]

    def _on_completing(self, event: SourceEvent) -> list[SourceCommand]:
        assert isinstance(event, told.StateRecorded)
        self.phase = P.COMPLETED
        return [
            do.ForgetDestination(self._request.key),
            do.EndMigration("completed", "the destination runs the guest"),
        ]

    # -- a lost link ---------------------------------------------------------------------------

    def _at_any_time(self, event: SourceEvent) -> list[SourceCommand] | None:
        """What this event means in every reversible phase alike, or None when it means something special."""
        match event:
            case told.LinkLost(reason):
                return self._on_link_lost(reason)
            case told.DestinationResumed():
                return self.link.answered(event)
            case told.StreamsResumed():
                return self._on_streams_resumed(event)
            case told.TimerFired(Timer.LINK_RETRY):
                return [] if self.link.up else self.link.ask(self.phase, self._question)
            case told.TimerFired(Timer.MIGRATION):
                return self._on_timeout()
            case _:
                return self._turn_back(event)

    def _on_link_lost(self, reason: str) -> list[SourceCommand]:
        if RECOVERIES[self.phase] is Recovery.NOT_NEEDED:
            return [do.Note("link_lost", {"decision": "go_on", "phase": self.phase.name, "reason": reason})]
        paused = self._pause_ordered
        if not self.link.patience(paused=paused)[1]:
            return self._abort(P.FAILED, reason, Cause.LINK)
        asked = self.link.lost(self.phase, self._question, reason, self._now_ns, paused=paused)
        return [*self._throttle(0), *asked]

    def _on_streams_resumed(self, event: told.StreamsResumed) -> list[SourceCommand]:
        lost_at_ns = self.link.lost_at_ns
        self.book.resent(event.resent_pages)
        commands = self.link.resumed(self.phase, event.resent_pages, self._now_ns)
        if not self.link.up:
            return commands
        self.book.link_was_lost(lost_at_ns, self._now_ns)
        if not self._pause_ordered:
            commands += self._throttle(self.book.throttle_percent)
        if self.phase in (P.SENDING, P.FINAL_SENDING) and not self.book.batch_outstanding:
            commands += self._send_on()
        return [*commands, *self._save()] if self._all_stored else commands

    def _throttle(self, percent: int) -> list[SourceCommand]:
        if percent == self._throttle_percent or (percent and not self.link.up):
            return []
        self._throttle_percent = percent
        return [do.ThrottleGuest(percent)]

    # -- turning back --------------------------------------------------------------------------

    def _on_timeout(self) -> list[SourceCommand]:
        """The migration's time is over: give up, or let the round under way be the last one."""
        limits = self._request.limits
        reason = f"not finished within the timeout of {limits.timeout_ms:g} ms"
        if limits.on_timeout == "cancel":
            return self._abort(P.CANCELLED, reason, Cause.LIMIT)
        ends = "the hand-over goes on" if self._pause_ordered else "the round under way is the last before it"
        return [do.Note("decision", {"decision": "stop_copy", "reason": f"{reason}: {ends}"})]

    def _turn_back(self, event: SourceEvent) -> list[SourceCommand] | None:
        turn = turn_of(event, self.link)
        return None if turn is None else self._abort(turn.phase, turn.reason, turn.cause)

    def _abort(self, end_phase: SourcePhase, reason: str, cause: Cause) -> list[SourceCommand]:
        self._turn = Turn(end_phase, reason, cause)
        note = do.Note(
            "decision", {"decision": self._turn.decision, "reason": reason, "phase": self.phase.name}
        )
        self.phase = P.ABORTING
        return [
            note,
            *(do.DisarmTimer(timer) for timer in Timer),
            do.RecordState(self._request.key, Recorded.ABORTED, reason),
            *self._throttle(0),
        ]

    def _on_aborting(self, event: SourceEvent) -> list[SourceCommand]:
        assert isinstance(event, told.StateRecorded)
        if event.state is not Recorded.ABORTED:
            return []  # the record of STARTED that was under way when the attempt turned back
        if not self._pause_ordered:
            return self._end_at_source()
        self.phase = P.RESUMING
        return [do.ResumeGuest(self._request.key)]

    def _on_resuming(self, event: SourceEvent) -> list[SourceCommand]:
        self._turn = self._turn.but(event)
        return self._end_at_source()

    def _end_at_source(self) -> list[SourceCommand]:
        self.phase = self._turn.phase
        return self._turn.ending(self._request.key, hints_ordered=self._hints_ordered)
