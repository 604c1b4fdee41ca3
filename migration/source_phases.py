"""The phases of a migration at the source, and which fact may happen in which of them, as data.

The machine in source_machine.py gives the facts their meaning; tests and diagrams are made from these tables.
A lost link is no phase of its own: what is done on this host goes on meanwhile. RECOVERIES says what is asked.
"""

from __future__ import annotations

from enum import Enum, auto

from migration.events import (
    AllAcknowledged,
    CancelRequested,
    CommitAnswered,
    CommitPending,
    DestinationOpened,
    DestinationResumed,
    EvidenceKept,
    GuestPaused,
    GuestResumed,
    GuestSaved,
    Harvested,
    HintsClosed,
    HintsOpened,
    HintsReported,
    HostFailed,
    LinkLost,
    MigrationRequested,
    PagesSent,
    PeerLost,
    PrepareAnswered,
    SourceEvent,
    StateRecorded,
    StreamsResumed,
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


class Recovery(Enum):
    """What a lost link asks for."""

    OPEN_AGAIN = auto()  # nothing was sent: the same question again
    RESUME = auto()  # open this very attempt again, and send what is not stored
    ASK_AGAIN = auto()  # the destination has every page: Prepare may be asked any number of times
    NOT_NEEDED = auto()  # the next question will show whether the link is there


RECOVERIES: dict[SourcePhase, Recovery] = {
    P.OPENING: Recovery.OPEN_AGAIN,
    P.ARMING: Recovery.RESUME,
    P.HINTING: Recovery.RESUME,
    P.SENDING: Recovery.RESUME,
    P.DRAINING: Recovery.RESUME,
    P.CLOSING_HINTS: Recovery.RESUME,
    P.HARVESTING: Recovery.RESUME,
    P.PAUSING: Recovery.RESUME,
    P.FINAL_HARVESTING: Recovery.RESUME,
    P.FINAL_SENDING: Recovery.RESUME,
    P.FINAL_DRAINING: Recovery.RESUME,
    P.SAVING: Recovery.NOT_NEEDED,
    P.PREPARING: Recovery.ASK_AGAIN,
    P.KEEPING_EVIDENCE: Recovery.NOT_NEEDED,
}
assert frozenset(RECOVERIES) == REVERSIBLE_PHASES, (
    "every phase that can turn back says what a lost link means"
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
    P.FINAL_DRAINING: {AllAcknowledged: frozenset({P.FINAL_DRAINING, P.SAVING})},
    P.SAVING: {GuestSaved: frozenset({P.PREPARING})},
    P.PREPARING: {PrepareAnswered: frozenset({P.RECORDING, P.KEEPING_EVIDENCE, P.ABORTING})},
    P.KEEPING_EVIDENCE: {EvidenceKept: frozenset({P.ABORTING})},
    # COMMITTING may be durable already when bad news comes in here: only the destination can be asked then.
    P.RECORDING: {
        StateRecorded: frozenset({P.COMMITTING}),
        TimerFired: frozenset({P.RECORDING}),
        CancelRequested: frozenset({P.RECORDING}),
        HostFailed: frozenset({P.RECORDING}),
    },
    P.COMMITTING: {
        CommitAnswered: frozenset({P.COMMITTING, P.COMPLETING, P.ABORTING}),
        PeerLost: frozenset({P.COMMITTING}),
        LinkLost: frozenset({P.COMMITTING}),
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
# What the lost link held up goes on.
_AFTER_RESUME = {
    P.SENDING: frozenset({P.SENDING, P.DRAINING}),
    P.FINAL_SENDING: frozenset({P.FINAL_SENDING, P.FINAL_DRAINING}),
    P.FINAL_DRAINING: frozenset({P.FINAL_DRAINING, P.SAVING}),
}
for _phase in REVERSIBLE_PHASES:
    for _event in (PeerLost, HostFailed, CancelRequested, TimerFired):
        _stays = frozenset({_phase}) if _event is TimerFired else frozenset()
        TRANSITIONS[_phase][_event] = TRANSITIONS[_phase].get(_event, _stays) | _stays | {P.ABORTING}
    _needed = RECOVERIES[_phase] is not Recovery.NOT_NEEDED
    TRANSITIONS[_phase][LinkLost] = frozenset({_phase, P.ABORTING} if _needed else {_phase})
# Where the answer to "resume" can come: a question is asked only while no other is unanswered, and what a shell
# does at once (arming, pausing) is told before its answer.
_ASKED = frozenset(
    {
        P.HINTING, P.SENDING, P.DRAINING, P.CLOSING_HINTS, P.HARVESTING,
        P.FINAL_HARVESTING, P.FINAL_SENDING, P.FINAL_DRAINING,
    }
)  # fmt: skip
for _phase in _ASKED:
    TRANSITIONS[_phase][DestinationResumed] = frozenset({_phase})
    if _phase is not P.FINAL_HARVESTING:
        TRANSITIONS[_phase][StreamsResumed] = _AFTER_RESUME.get(_phase, frozenset({_phase}))
del TRANSITIONS[P.KEEPING_EVIDENCE][LinkLost]  # no stream is open, and nothing is asked
del TRANSITIONS[P.KEEPING_EVIDENCE][PeerLost]

# News of the connection that no shell tells there; should one, it is no reason to stop: it changes nothing.
WITHOUT_MEANING: dict[SourcePhase, frozenset[type[SourceEvent]]] = {
    _phase: frozenset({LinkLost, PeerLost, DestinationResumed}) - TRANSITIONS[_phase].keys()
    for _phase in (REVERSIBLE_PHASES - {P.OPENING}) | {P.RECORDING, P.COMMITTING}
}

# Answers to commands that were under way when the attempt turned back or ended, and repeated bad news:
# legal there, and without effect.
LATE_ANSWERS: frozenset[type[SourceEvent]] = frozenset(
    {
        DestinationOpened, TrackingStarted, Harvested, HintsOpened, HintsReported, HintsClosed, PagesSent,
        AllAcknowledged, GuestPaused, GuestSaved, PrepareAnswered, CommitAnswered, TimerFired, PeerLost,
        HostFailed, CancelRequested, StateRecorded, GuestResumed, EvidenceKept,
        LinkLost, DestinationResumed, StreamsResumed,
    }
)  # fmt: skip
TURNED_PHASES = FINAL_PHASES | {P.ABORTING, P.RESUMING, P.COMPLETING}
# Where a report may be open. Hints that come at any other time are counted as stale, and change nothing.
HINT_PHASES = frozenset({P.HINTING, P.SENDING, P.DRAINING, P.CLOSING_HINTS})


def means_nothing(phase: SourcePhase, event: type[SourceEvent]) -> bool:
    """Whether such an event, which is in no row of the table for this phase, is legal there and changes nothing."""
    return (phase in TURNED_PHASES and event in LATE_ANSWERS) or event in WITHOUT_MEANING.get(phase, ())
