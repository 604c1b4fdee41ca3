"""The phases of a migration at the source, and which fact may happen in which of them, as data.

The machine in source_machine.py gives the facts their meaning; tests and diagrams are made from this table.
"""

from __future__ import annotations

from enum import Enum, auto

from migration.events import (
    AllAcknowledged,
    CancelRequested,
    CommitAnswered,
    CommitPending,
    DestinationOpened,
    EvidenceKept,
    GuestPaused,
    GuestResumed,
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
    SourceEvent,
    StateRecorded,
    TimerFired,
    TrackingStarted,
)


class SourcePhase(Enum):
    """Where an attempt stands. The last four are final."""

    IDLE = auto()
    OPENING = auto()
    ARMING = auto()
    HINTING = auto()
    SENDING = auto()
    DRAINING = auto()
    CLOSING_HINTS = auto()
    HARVESTING = auto()
    PAUSING = auto()
    FINAL_HARVESTING = auto()
    FINAL_SENDING = auto()
    FINAL_DRAINING = auto()
    SAVING = auto()
    PREPARING = auto()
    KEEPING_EVIDENCE = auto()
    RECORDING = auto()
    COMMITTING = auto()
    COMPLETING = auto()
    ABORTING = auto()
    RESUMING = auto()
    COMPLETED = auto()
    REHEARSED = auto()
    CANCELLED = auto()
    FAILED = auto()


P = SourcePhase
FINAL_PHASES = frozenset({P.COMPLETED, P.REHEARSED, P.CANCELLED, P.FAILED})
# Phases in which a failure or a cancellation leads back to the source, unconditionally.
REVERSIBLE_PHASES = (
    frozenset(P) - FINAL_PHASES - {P.IDLE, P.RECORDING, P.COMMITTING, P.COMPLETING, P.ABORTING, P.RESUMING}
)

TRANSITIONS: dict[SourcePhase, dict[type[SourceEvent], frozenset[SourcePhase]]] = {
    P.IDLE: {MigrationRequested: frozenset({P.OPENING}), CommitPending: frozenset({P.COMMITTING})},
    P.OPENING: {StateRecorded: frozenset({P.OPENING}), DestinationOpened: frozenset({P.ARMING})},
    P.ARMING: {TrackingStarted: frozenset({P.HINTING, P.SENDING})},
    P.HINTING: {
        HintsOpened: frozenset({P.HINTING}),
        HintsReported: frozenset({P.HINTING, P.SENDING, P.DRAINING}),
        TimerFired: frozenset({P.HINTING, P.SENDING, P.DRAINING}),
    },
    P.SENDING: {
        PagesSent: frozenset({P.SENDING, P.DRAINING}),
        HintsReported: frozenset({P.SENDING}),
        TimerFired: frozenset({P.SENDING}),
    },
    P.DRAINING: {
        AllAcknowledged: frozenset({P.CLOSING_HINTS, P.HARVESTING}),
        HintsReported: frozenset({P.DRAINING}),
        TimerFired: frozenset({P.DRAINING}),
    },
    P.CLOSING_HINTS: {
        HintsClosed: frozenset({P.HARVESTING}),
        HintsReported: frozenset({P.CLOSING_HINTS}),
        TimerFired: frozenset({P.CLOSING_HINTS}),
    },
    P.HARVESTING: {
        Harvested: frozenset({P.HINTING, P.SENDING, P.PAUSING, P.ABORTING}),
        TimerFired: frozenset({P.HARVESTING}),
    },
    P.PAUSING: {GuestPaused: frozenset({P.FINAL_HARVESTING})},
    P.FINAL_HARVESTING: {Harvested: frozenset({P.FINAL_SENDING, P.FINAL_DRAINING})},
    P.FINAL_SENDING: {PagesSent: frozenset({P.FINAL_SENDING, P.FINAL_DRAINING})},
    P.FINAL_DRAINING: {AllAcknowledged: frozenset({P.SAVING})},
    P.SAVING: {GuestSaved: frozenset({P.PREPARING})},
    P.PREPARING: {PrepareAnswered: frozenset({P.RECORDING, P.KEEPING_EVIDENCE, P.ABORTING})},
    P.KEEPING_EVIDENCE: {EvidenceKept: frozenset({P.ABORTING})},
    # COMMITTING may be durable already when bad news comes in here: only the destination can be asked then.
    P.RECORDING: {
        StateRecorded: frozenset({P.COMMITTING}),
        PeerLost: frozenset({P.RECORDING}),
        TimerFired: frozenset({P.RECORDING}),
        CancelRequested: frozenset({P.RECORDING}),
        HostFailed: frozenset({P.RECORDING}),
    },
    P.COMMITTING: {
        CommitAnswered: frozenset({P.COMMITTING, P.COMPLETING, P.ABORTING}),
        PeerLost: frozenset({P.COMMITTING}),
        TimerFired: frozenset({P.COMMITTING}),
        CancelRequested: frozenset({P.COMMITTING}),
        HostFailed: frozenset({P.COMMITTING}),
    },
    P.COMPLETING: {StateRecorded: frozenset({P.COMPLETED})},
    P.ABORTING: {StateRecorded: frozenset({P.ABORTING, P.RESUMING, P.CANCELLED, P.FAILED})},
    P.RESUMING: {
        GuestResumed: frozenset({P.REHEARSED, P.CANCELLED, P.FAILED}),
        HostFailed: frozenset({P.FAILED}),
    },
    P.COMPLETED: {},
    P.REHEARSED: {},
    P.CANCELLED: {},
    P.FAILED: {},
}
for _phase in REVERSIBLE_PHASES:
    for _event in (PeerLost, HostFailed, CancelRequested, TimerFired):
        _targets = TRANSITIONS[_phase].get(
            _event, frozenset({_phase}) if _event is TimerFired else frozenset()
        )
        TRANSITIONS[_phase][_event] = _targets | {P.ABORTING}

# Answers to commands that were under way when the attempt turned back or ended, and repeated bad news:
# legal there, and without effect.
LATE_ANSWERS: frozenset[type[SourceEvent]] = frozenset(
    {
        DestinationOpened, TrackingStarted, Harvested, HintsOpened, HintsReported, HintsClosed, PagesSent,
        AllAcknowledged, GuestPaused, GuestSaved, PrepareAnswered, CommitAnswered, TimerFired, PeerLost,
        HostFailed, CancelRequested, StateRecorded, GuestResumed, EvidenceKept,
    }
)  # fmt: skip
TURNED_PHASES = FINAL_PHASES | {P.ABORTING, P.RESUMING, P.COMPLETING}
# Where a report may be open. Hints that come at any other time are counted as stale, and change nothing.
HINT_PHASES = frozenset({P.HINTING, P.SENDING, P.DRAINING, P.CLOSING_HINTS})
