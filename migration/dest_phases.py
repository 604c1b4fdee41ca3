"""The phases of an attempt at the destination, and which fact may happen in which of them, as data.

The machine in dest_machine.py gives the facts their meaning; tests and diagrams are made from this table.
"""

from __future__ import annotations

from enum import Enum, auto

from migration.events import (
    AbortRequested,
    CommitRequested,
    DestEvent,
    ForgetRequested,
    GuestConfirmed,
    GuestGivenAway,
    GuestRestored,
    GuestStarted,
    GuestStartFailed,
    ImageRefused,
    ImageVerified,
    IntakeFailed,
    OpenRequested,
    PrepareRequested,
    StateNotRecorded,
    StateRecorded,
    StreamBroken,
    StreamsJoined,
)


class DestPhase(Enum):
    """Where the attempt at hand stands here."""

    IDLE = auto()
    OPENING = auto()
    RECEIVING = auto()
    LINK_LOST = auto()  # the connection may come back
    JOINING = auto()  # it did; the streams of the lost one are being joined
    VERIFYING = auto()
    RESTORING = auto()
    RECORDING_PREPARED = auto()
    PREPARED = auto()
    CONFIRMING = auto()
    RECORDING_COMMITTED = auto()
    STARTING = auto()
    COMMITTED = auto()
    ABORTING = auto()
    ABORTED = auto()


P = DestPhase

TRANSITIONS: dict[DestPhase, dict[type[DestEvent], frozenset[DestPhase]]] = {
    P.IDLE: {OpenRequested: frozenset({P.OPENING})},
    P.OPENING: {StateRecorded: frozenset({P.RECEIVING}), StateNotRecorded: frozenset({P.IDLE})},
    P.RECEIVING: {
        OpenRequested: frozenset({P.RECEIVING, P.JOINING, P.ABORTING}),
        StreamBroken: frozenset({P.LINK_LOST, P.ABORTING}),
        IntakeFailed: frozenset({P.ABORTING}),
        PrepareRequested: frozenset({P.VERIFYING}),
    },
    P.LINK_LOST: {
        OpenRequested: frozenset({P.JOINING, P.ABORTING}),
        StreamBroken: frozenset({P.LINK_LOST}),
        IntakeFailed: frozenset({P.ABORTING}),
        PrepareRequested: frozenset({P.VERIFYING}),
    },
    P.JOINING: {StreamsJoined: frozenset({P.RECEIVING}), IntakeFailed: frozenset({P.ABORTING})},
    P.VERIFYING: {ImageVerified: frozenset({P.RESTORING, P.ABORTING}), ImageRefused: frozenset({P.ABORTING})},
    P.RESTORING: {GuestRestored: frozenset({P.RECORDING_PREPARED}), ImageRefused: frozenset({P.ABORTING})},
    P.RECORDING_PREPARED: {
        StateRecorded: frozenset({P.PREPARED}),
        StateNotRecorded: frozenset({P.ABORTING}),
    },
    P.PREPARED: {
        OpenRequested: frozenset({P.ABORTING}),
        StreamBroken: frozenset({P.PREPARED}),
        PrepareRequested: frozenset({P.PREPARED}),
        CommitRequested: frozenset({P.CONFIRMING}),
    },
    P.CONFIRMING: {GuestConfirmed: frozenset({P.RECORDING_COMMITTED}), ImageRefused: frozenset({P.ABORTING})},
    P.RECORDING_COMMITTED: {
        StateRecorded: frozenset({P.STARTING}),
        StateNotRecorded: frozenset({P.RECORDING_COMMITTED}),
        CommitRequested: frozenset({P.RECORDING_COMMITTED}),
        StreamBroken: frozenset({P.RECORDING_COMMITTED}),
    },
    P.STARTING: {
        GuestStarted: frozenset({P.COMMITTED}),
        GuestStartFailed: frozenset({P.STARTING, P.COMMITTED}),
        CommitRequested: frozenset({P.STARTING}),
        AbortRequested: frozenset({P.STARTING}),
        StreamBroken: frozenset({P.STARTING}),
    },
    P.COMMITTED: {
        StreamBroken: frozenset({P.COMMITTED}),
        CommitRequested: frozenset({P.COMMITTED}),
        PrepareRequested: frozenset({P.COMMITTED}),
    },
    P.ABORTING: {
        StateRecorded: frozenset({P.ABORTED, P.OPENING}),
        StateNotRecorded: frozenset({P.ABORTING}),
        OpenRequested: frozenset({P.ABORTING}),
        PrepareRequested: frozenset({P.ABORTING}),
        CommitRequested: frozenset({P.ABORTING}),
        AbortRequested: frozenset({P.ABORTING}),
    },
    P.ABORTED: {
        OpenRequested: frozenset({P.OPENING}),
        PrepareRequested: frozenset({P.ABORTED}),
        CommitRequested: frozenset({P.ABORTED}),
    },
}
for _phase in (P.RECEIVING, P.LINK_LOST, P.PREPARED):
    TRANSITIONS[_phase][AbortRequested] = frozenset({P.ABORTING})
for _phase in (P.COMMITTED, P.ABORTED):
    TRANSITIONS[_phase][AbortRequested] = frozenset({_phase})
TRANSITIONS[P.COMMITTED][ForgetRequested] = frozenset({P.COMMITTED})
TRANSITIONS[P.ABORTED][ForgetRequested] = frozenset({P.IDLE})
TRANSITIONS[P.IDLE][GuestGivenAway] = TRANSITIONS[P.COMMITTED][GuestGivenAway] = frozenset({P.IDLE})

# Where an attempt can be gone on with after its connection was lost. Later its pages are complete, and the calls
# that follow can simply be made again.
RESUMABLE_PHASES = frozenset({P.RECEIVING, P.LINK_LOST})
