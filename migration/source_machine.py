"""The source of a migration: `(state, event, now) -> commands`, no I/O (DESIGN 3.1, 3.3, 3.4).

Rule 1: a command id is issued only after the round's set was harvested, and the next harvest happens only
        after the id was closed and the queue drained. A hint touches that one set, never the dirty log.
Rule 2: hints come first: a round waits for the guest's STOP, for a bounded time, before it sends anything.
Rule 3: the end is pause, rings stopped, last harvest, last pages, state, Prepare - in this order.
Rule 4: before COMMITTING is recorded every failure ends in ABORTED, recorded before the guest runs again.
Rule 5: after COMMITTING is recorded only the destination's answer decides; "unknown" is no answer.
Rule 6: however an attempt ends at the source, a guest that was asked for hints is told DONE.
Rule 7: a rehearsal goes the same way up to Prepare, which only verifies, and then turns back like any attempt that
        cannot go on: ABORTED is recorded before the guest runs. It never comes near COMMITTING.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from migration.commands import (
    AbortDestination,
    ArmTimer,
    AwaitAcknowledgements,
    CloseHints,
    DisarmTimer,
    EndHints,
    EndMigration,
    ForgetDestination,
    FreezeGuest,
    Harvest,
    KeepEvidence,
    Note,
    OpenDestination,
    OpenHints,
    PauseGuest,
    RecordState,
    ResumeGuest,
    SaveGuest,
    SendCommit,
    SendPages,
    SendPrepare,
    SourceCommand,
    StartTracking,
)
from migration.errors import LocalProtocolError
from migration.events import (
    AllAcknowledged,
    Answer,
    CancelRequested,
    CommitAnswered,
    CommitPending,
    DestinationOpened,
    EvidenceKept,
    GuestPaused,
    GuestSaved,
    Harvested,
    HintsClosed,
    HintsOpened,
    HintsReported,
    HostFailed,
    MigrationRequested,
    PagesSent,
    PeerLost,
    PrepareAnswered,
    Recorded,
    Skip,
    SourceEvent,
    StateRecorded,
    Timer,
    TimerFired,
    TrackingStarted,
)
from migration.ledger import MigrationLedger, RoundTotals
from migration.round_set import RoundSet
from migration.rounds import DecisionKind, Limits, RoundStats, decide
from migration.source_phases import (
    FINAL_PHASES,
    HINT_PHASES,
    LATE_ANSWERS,
    REVERSIBLE_PHASES,
    TRANSITIONS,
    TURNED_PHASES,
    SourcePhase,
)

if TYPE_CHECKING:
    from migration.pages import BoolArray

COMMIT_RETRY_MS = 500  # the guest stands still meanwhile: ask often, but do not hammer a dead host
BATCH_PAGES = 2048  # 8 MiB: hints and decisions take effect between batches; smaller ones cost hand-overs


P = SourcePhase


class SourceMachine:
    """One attempt. `handle` is the only way in, its commands the only way out."""

    def __init__(self) -> None:
        self.phase = P.IDLE
        self.ledger = MigrationLedger()
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
        self._request: MigrationRequested
        self._round: RoundSet | None = None
        self._round_started_ns = 0
        self._sending_since_ns = 0
        self._sending_ns = 0
        self._payload_bytes = 0
        self._pending: BoolArray
        self._image_digest = 0
        self._commits_unanswered = 0
        self._pause_ordered = False
        self._hints_ordered = False
        self._hints_open = False
        self._command_id: int | None = None  # of the open report, once it was issued
        self._end_phase = P.FAILED
        self._end_reason = ""
        self._started_ns = 0
        self._now_ns = 0

    # -- the one entrance ----------------------------------------------------------------------

    def handle(self, event: SourceEvent, now_ns: int) -> list[SourceCommand]:
        """Takes one fact, returns the orders that follow from it.

        Raises:
            LocalProtocolError: the shell told something that cannot happen in this phase.
        """
        self._now_ns = now_ns
        if isinstance(event, HintsReported) and not self._counts(event):
            # The guest may answer late, or an earlier attempt's id, at any time: that is never our error.
            self.ledger.count_stale(event.stale_pages + int(event.page_count.sum()))
            self.ledger.count_rejected(event.rejected_ranges)
            return []
        allowed = TRANSITIONS[self.phase].get(type(event))
        if allowed is None:
            if self.phase in TURNED_PHASES and type(event) in LATE_ANSWERS:
                return []
            raise LocalProtocolError(f"{type(event).__name__} in phase {self.phase.name}")
        before = self.phase
        commands = self._turn_back(event) if before in REVERSIBLE_PHASES else None
        if commands is None:
            commands = self._handlers[before](event)
        assert self.phase in allowed, (before, type(event).__name__, self.phase)
        return commands

    def _counts(self, report: HintsReported) -> bool:
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
    def round_set(self) -> RoundSet | None:
        """The set being sent, for progress; None before round 1."""
        return self._round

    @property
    def _current(self) -> RoundSet:
        assert self._round is not None, f"no round in phase {self.phase.name}"
        return self._round

    # -- beginning -----------------------------------------------------------------------------

    def _on_idle(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, CommitPending):
            # What the attempt was asked for no longer matters; if it turns back, the guest is paused here.
            self._request = MigrationRequested(event.key, 0, Skip.NONE, Limits(), 0)
            self._image_digest = event.image_digest
            self._pause_ordered = self._hints_ordered = True
            self.phase = P.COMMITTING
            return [SendCommit(event.key, event.image_digest)]
        assert isinstance(event, MigrationRequested)
        self._request = event
        self._started_ns = self._now_ns
        self.phase = P.OPENING
        commands: list[SourceCommand] = [RecordState(event.key, Recorded.STARTED)]
        if math.isfinite(event.limits.timeout_ms):
            commands.append(ArmTimer(Timer.MIGRATION, math.ceil(event.limits.timeout_ms)))
        return [*commands, OpenDestination(event.key)]

    def _on_opening(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, DestinationOpened):
            return []
        self.phase = P.ARMING
        return [StartTracking()]

    def _on_arming(self, event: SourceEvent) -> list[SourceCommand]:
        assert isinstance(event, TrackingStarted)
        if event.ballooned is None:
            return self._begin_round(np.ones(self._request.pages, np.bool_), 0)
        return self._begin_round(~event.ballooned, int(np.count_nonzero(event.ballooned)))

    # -- rounds --------------------------------------------------------------------------------

    def _begin_round(self, candidates: BoolArray, ballooned_pages: int) -> list[SourceCommand]:
        hints = self._request.skip.uses_hints
        note = self._open_round(candidates, ballooned_pages, hints=hints)
        if not hints:
            return [note, *self._send_next(P.SENDING, P.DRAINING)]
        self.phase = P.HINTING
        self._hints_ordered = self._hints_open = True
        self._command_id = None
        return [note, OpenHints(), ArmTimer(Timer.HINT_WAIT, self._request.hint_wait_ms)]

    def _open_round(self, candidates: BoolArray, ballooned_pages: int, *, hints: bool) -> Note:
        self._round = RoundSet(len(self.ledger.rounds) + 1, candidates, hints_allowed=hints)
        self._round.ledger.ballooned_pages = ballooned_pages
        self._round_started_ns = self._now_ns
        return Note("round_started", {"round": self._round.index, "candidate_pages": self._round.remaining})

    def _on_hinting(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, HintsOpened):
            self._command_id = event.command_id
            return []
        if isinstance(event, HintsReported):
            self._apply_hints(event)
            if not event.stopped:
                return []
            return [DisarmTimer(Timer.HINT_WAIT), *self._send_next(P.SENDING, P.DRAINING)]
        if isinstance(event, TimerFired) and event.timer is Timer.HINT_WAIT:
            return self._send_next(P.SENDING, P.DRAINING)
        return []

    def _apply_hints(self, event: HintsReported) -> None:
        self._current.hint(event.pfn_first, event.page_count)
        self._current.ledger.count_stale(event.stale_pages)
        self._current.ledger.count_rejected(event.rejected_ranges)

    def _send_next(self, sending: SourcePhase, drained: SourcePhase) -> list[SourceCommand]:
        if self.phase is not sending:
            self._sending_since_ns = self._now_ns
        pfns = self._current.take(BATCH_PAGES)
        if len(pfns) == 0:
            self.phase = drained
            return [AwaitAcknowledgements()]
        self.phase = sending
        return [SendPages(self._current.index, pfns)]

    def _on_sending(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, HintsReported):
            self._apply_hints(event)
            return []
        if isinstance(event, PagesSent):
            self._current.record_sent(event.data_pages, event.zero_pages, event.payload_bytes)
            if self.phase is P.FINAL_SENDING:
                return self._send_next(P.FINAL_SENDING, P.FINAL_DRAINING)
            return self._send_next(P.SENDING, P.DRAINING)
        return []

    def _on_draining(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, HintsReported):
            self._apply_hints(event)
            return []
        if not isinstance(event, AllAcknowledged):
            return []
        if self._hints_open:
            self.phase = P.CLOSING_HINTS
            return [CloseHints()]
        self.phase = P.HARVESTING
        return [Harvest()]

    def _on_closing_hints(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, HintsClosed):
            self._apply_hints(event.last)
            self._hints_open = False
            self.phase = P.HARVESTING
            return [Harvest()]
        if isinstance(event, HintsReported):
            self._apply_hints(event)
        return []

    def _on_harvesting(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, Harvested):
            return []
        totals = self._finish_round(event.dirty)
        remaining_pages = int(np.count_nonzero(event.dirty))
        decision = decide(
            RoundStats(
                index=totals.index,
                elapsed_ms=(self._now_ns - self._started_ns) / 1e6,
                remaining_pages=remaining_pages,
                rate_bytes_per_s=self._payload_bytes * 1e9 / max(self._sending_ns, 1),
            ),
            self._request.limits,
        )
        note = self._round_note(totals, remaining_pages, decision.kind.name.lower(), decision.reason)
        if decision.kind is DecisionKind.NEXT_ROUND:
            return [note, *self._begin_round(event.dirty, event.ballooned_pages)]
        if decision.kind is DecisionKind.STOP_COPY:
            self._pending = event.dirty
            self._pause_ordered = True
            self.phase = P.PAUSING
            return [note, PauseGuest()]
        return [note, *self._abort(P.CANCELLED, decision.reason)]

    def _finish_round(self, dirty: BoolArray | None) -> RoundTotals:
        totals = self._current.finish(dirty)
        self.ledger.add(totals)
        self._payload_bytes += totals.payload_bytes
        self._sending_ns += self._now_ns - self._sending_since_ns
        return totals

    def _round_note(self, totals: RoundTotals, dirtied_pages: int, decision: str, reason: str) -> Note:
        fields: dict[str, object] = dict(totals.to_dict())
        fields["round"] = fields.pop("index")
        return Note(
            "round_ended",
            {
                **fields,
                "duration_ms": (self._now_ns - self._round_started_ns) / 1e6,
                "dirtied_pages": dirtied_pages,
                "decision": decision,
                "reason": reason,
            },
        )

    # -- stop and copy -------------------------------------------------------------------------

    def _on_pausing(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, GuestPaused):
            return []
        self.phase = P.FINAL_HARVESTING
        return [Harvest()]

    def _on_final_harvesting(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, Harvested):
            return []
        note = self._open_round(self._pending | event.dirty, event.ballooned_pages, hints=False)
        return [note, *self._send_next(P.FINAL_SENDING, P.FINAL_DRAINING)]

    def _on_final_draining(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, AllAcknowledged):
            return []
        totals = self._finish_round(None)
        self.phase = P.SAVING
        return [
            self._round_note(totals, 0, "handover", "the guest is paused and every page is sent"),
            SaveGuest(self._request.rehearsal),
        ]

    # -- hand-over -----------------------------------------------------------------------------

    def _on_saving(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, GuestSaved):
            return []
        self._image_digest = event.image_digest
        self.phase = P.PREPARING
        return [SendPrepare(self._request.key, event.image_digest, self._request.rehearsal)]

    def _on_preparing(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, PrepareAnswered):
            return []
        wanted = Answer.VERIFIED if self._request.rehearsal else Answer.PREPARED
        if event.answer is not wanted:
            return self._abort(P.FAILED, f"the destination could not prepare: {event.reason}")
        if self._request.rehearsal:
            self.phase = P.KEEPING_EVIDENCE
            return [KeepEvidence()]
        self.phase = P.RECORDING
        return [RecordState(self._request.key, Recorded.COMMITTING)]

    def _on_keeping_evidence(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, EvidenceKept):
            return []
        return self._abort(P.REHEARSED, "a rehearsal: the guest goes on at the source")

    def _on_recording(self, event: SourceEvent) -> list[SourceCommand]:
        if not isinstance(event, StateRecorded) or event.state is not Recorded.COMMITTING:
            return []
        self.phase = P.COMMITTING
        return [DisarmTimer(Timer.MIGRATION), SendCommit(self._request.key, self._image_digest)]

    def _on_committing(self, event: SourceEvent) -> list[SourceCommand]:
        key = self._request.key
        if isinstance(event, CommitAnswered) and event.answer is Answer.COMMITTED:
            self.phase = P.COMPLETING
            return [DisarmTimer(Timer.COMMIT_RETRY), FreezeGuest(key), RecordState(key, Recorded.COMPLETED)]
        if isinstance(event, CommitAnswered) and event.answer is Answer.ABORTED:
            return self._abort(P.FAILED, f"the destination gave up: {event.reason}")
        if isinstance(event, TimerFired):
            retry = event.timer is Timer.COMMIT_RETRY
            return [SendCommit(key, self._image_digest)] if retry else []
        if isinstance(event, CancelRequested | HostFailed):
            return [Note("cancel_refused", {"reason": "only the destination can decide after COMMITTING"})]
        reason = event.reason if isinstance(event, CommitAnswered | PeerLost) else ""
        self._commits_unanswered += 1
        times = self._commits_unanswered
        # Asking goes on for as long as it takes; its history stays short: the 1st, 2nd, 4th, 8th ... time.
        note = (
            [Note("commit_unanswered", {"reason": reason, "times": times})] if times.bit_count() == 1 else []
        )
        return [*note, ArmTimer(Timer.COMMIT_RETRY, COMMIT_RETRY_MS)]

    def _on_completing(self, event: SourceEvent) -> list[SourceCommand]:
        assert isinstance(event, StateRecorded)
        self.phase = P.COMPLETED
        return [
            ForgetDestination(self._request.key),
            EndMigration("completed", "the destination runs the guest"),
        ]

    # -- turning back --------------------------------------------------------------------------

    def _turn_back(self, event: SourceEvent) -> list[SourceCommand] | None:
        """The abort that this event means in a reversible phase, or None when it means none."""
        match event:
            case CancelRequested(reason):
                return self._abort(P.CANCELLED, reason)
            case PeerLost(reason) | HostFailed(reason):
                return self._abort(P.FAILED, reason)
            case TimerFired(Timer.MIGRATION):
                limit_ms = self._request.limits.timeout_ms
                return self._abort(P.CANCELLED, f"not finished within the timeout of {limit_ms} ms")
            case _:
                return None

    def _abort(self, end_phase: SourcePhase, reason: str) -> list[SourceCommand]:
        self._end_phase, self._end_reason = end_phase, reason
        self.phase = P.ABORTING
        return [
            DisarmTimer(Timer.HINT_WAIT),
            DisarmTimer(Timer.MIGRATION),
            DisarmTimer(Timer.COMMIT_RETRY),
            RecordState(self._request.key, Recorded.ABORTED, reason),
        ]

    def _on_aborting(self, event: SourceEvent) -> list[SourceCommand]:
        assert isinstance(event, StateRecorded)
        if event.state is not Recorded.ABORTED:
            return []  # the record of STARTED that was under way when the attempt turned back
        if not self._pause_ordered:
            return self._end_at_source()
        self.phase = P.RESUMING
        return [ResumeGuest(self._request.key)]

    def _on_resuming(self, event: SourceEvent) -> list[SourceCommand]:
        if isinstance(event, HostFailed):
            self._end_phase = P.FAILED
            self._end_reason = f"{self._end_reason}; and the guest could not be resumed: {event.reason}"
        return self._end_at_source()

    def _end_at_source(self) -> list[SourceCommand]:
        self.phase = self._end_phase
        hints: list[SourceCommand] = [EndHints()] if self._hints_ordered else []
        if self._end_phase is P.REHEARSED:  # the destination aborted it before it answered VERIFIED
            key = self._request.key
            return [*hints, ForgetDestination(key), EndMigration("rehearsal", self._end_reason)]
        outcome = "cancelled" if self._end_phase is P.CANCELLED else "failed"
        return [
            *hints,
            AbortDestination(self._request.key, self._end_reason),
            EndMigration(outcome, self._end_reason),
        ]
