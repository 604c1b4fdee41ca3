"""The destination of a migration, no I/O: where the ownership of a guest is decided (DESIGN 3.4, 3.7).

Rule 1: one attempt at a time. A newer attempt is taken in only after the older one was aborted, its writers
        joined and its memory made zero again; never while an outcome is open (PREPARED) or a guest runs here.
Rule 2: PREPARED is recorded only after every writer is joined, the image verified and the agent restored it.
Rule 3: PREPARED becomes COMMITTED in one durable step, and the guest runs only after it. COMMITTED is answered,
        and may be forgotten, only when the guest runs (or its process is known to be gone).
Rule 4: once ABORTED is recorded for an attempt, nothing makes it anything else.
Rule 5: a rehearsal is verified and then aborted, durably, before it is answered: nothing can commit it. Whether it
        was verified is no matter of ownership: whoever lost the answer is told again.
Rule 6: a call about another attempt than the one at hand is answered from what was recorded, or UNKNOWN.
Rule 7: a lost connection ends an attempt at once, unless its source said how long one may take to come back.
        Going on is possible only with the very attempt at hand, while it is being received, and only after
        every older stream was joined: a late chunk of one is never stored.
Rule 8: a host that gave away what it took in can take in again. The guest comes back, if it does, with a later
        epoch: an attempt on the epoch that was given away here, or an older one, is over and is refused.
Rule 9: what the journal did not take has not happened: nothing that needs it is answered, and the next call that
        needs it has it written again. COMMITTED may be in it all the same: from the first try on nothing but
        COMMITTED can follow. An attempt that cannot be recorded as PREPARED is given up.

The phases and the table of transitions are in dest_phases.py.
"""

from __future__ import annotations

from collections.abc import Callable

from migration.commands import (
    ConfirmGuest,
    DestCommand,
    DiscardImage,
    ForgetAttempt,
    JoinStreams,
    KeepEvidence,
    Note,
    RecordState,
    Reply,
    ReserveMemory,
    RestoreGuest,
    RunGuest,
    VerifyImage,
)
from migration.dest_phases import RESUMABLE_PHASES, TRANSITIONS, DestPhase
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.events import (
    AbortRequested,
    Answer,
    CommitRequested,
    DestEvent,
    ForgetRequested,
    GuestGivenAway,
    GuestStarted,
    GuestStartFailed,
    ImageRefused,
    IntakeFailed,
    OpenRequested,
    PrepareRequested,
    Recorded,
    StateNotRecorded,
    StateRecorded,
    StreamBroken,
)
from migration.identity import AttemptKey

P = DestPhase

AboutKnownAttempt = PrepareRequested | CommitRequested | AbortRequested | ForgetRequested


class DestMachine:
    """One host's side of taking guests in, one after the other (Rules 1 and 8)."""

    def __init__(self) -> None:
        self.phase = P.IDLE
        self.key: AttemptKey | None = None
        self._given_epoch = 0  # the newest that was given away from here
        self._memory_bytes = 0
        self._link_timeout_ms = 0
        self._prepare: PrepareRequested | None = None
        self._abort_reason = ""
        self._next_open: OpenRequested | None = None
        self._reply_when_aborted: Answer | None = None
        self._verified_digest: int | None = None  # of a rehearsal, whose answer may have been lost
        self._handlers: dict[DestPhase, Callable[[DestEvent], list[DestCommand]]] = {
            P.IDLE: self._on_idle,
            P.OPENING: self._on_opening,
            P.RECEIVING: self._on_receiving,
            P.LINK_LOST: self._on_receiving,
            P.JOINING: self._on_joining,
            P.VERIFYING: self._on_verifying,
            P.RESTORING: self._on_restoring,
            P.RECORDING_PREPARED: self._on_recording_prepared,
            P.PREPARED: self._on_prepared,
            P.CONFIRMING: self._on_confirming,
            P.RECORDING_COMMITTED: self._on_recording_committed,
            P.STARTING: self._on_starting,
            P.COMMITTED: self._on_committed,
            P.ABORTING: self._on_aborting,
            P.ABORTED: self._on_aborted,
        }

    def handle(self, event: DestEvent) -> list[DestCommand]:
        """Takes one fact or call, returns the orders that follow; a call is answered by one Reply.

        Raises:
            RemoteProtocolError: a call that this attempt does not allow, or about another attempt.
            LocalProtocolError: the shell told something that cannot happen in this phase.
        """
        if isinstance(event, AboutKnownAttempt) and event.key != self.key:
            return [Reply(Answer.UNKNOWN, f"attempt {event.key} is not known here")]
        if isinstance(event, OpenRequested):
            self._check_open(event)
        allowed = TRANSITIONS[self.phase].get(type(event))
        if allowed is None:
            if isinstance(event, OpenRequested | AboutKnownAttempt):
                raise RemoteProtocolError(
                    f"{type(event).__name__} is not possible in phase {self.phase.name}"
                )
            raise LocalProtocolError(f"{type(event).__name__} in phase {self.phase.name}")
        before = self.phase
        commands = self._handlers[before](event)
        assert self.phase in allowed, (before, type(event).__name__, self.phase)
        return commands

    @property
    def abort_reason(self) -> str:
        """Why the attempt at hand was aborted; empty while it was not."""
        return self._abort_reason

    def allows(self, event: type[DestEvent]) -> bool:
        """Whether such an event may happen now."""
        return event in TRANSITIONS[self.phase]

    def _check_open(self, event: OpenRequested) -> None:
        if event.key.guest_epoch <= self._given_epoch:
            raise RemoteProtocolError(
                f"attempt {event.key} is over: this host gave the guest away at epoch {self._given_epoch}"
            )
        if event.resume and event.key != self.key:
            raise RemoteProtocolError(
                f"attempt {event.key} cannot be resumed: nothing of it is left here, begin a new attempt"
            )
        if event.resume and self.phase not in RESUMABLE_PHASES:
            why = f": {self._abort_reason}" if self.phase is P.ABORTED else ""
            raise RemoteProtocolError(
                f"attempt {event.key} cannot be resumed, it is {self.phase.name} here{why}"
            )
        if event.key == self.key and event.memory_bytes != self._memory_bytes:
            raise RemoteProtocolError(
                f"attempt {event.key} was opened with {self._memory_bytes} bytes of memory, "
                f"not {event.memory_bytes}"
            )

    # -- taking in -----------------------------------------------------------------------------

    def _on_idle(self, event: DestEvent) -> list[DestCommand]:
        return self._forget_guest(event) if isinstance(event, GuestGivenAway) else self._on_open(event)

    def _on_open(self, event: DestEvent) -> list[DestCommand]:
        assert isinstance(event, OpenRequested)
        self.key, self._memory_bytes = event.key, event.memory_bytes
        self._link_timeout_ms = event.link_timeout_ms
        self._prepare, self._abort_reason, self._next_open = None, "", None
        self._verified_digest = None
        self.phase = P.OPENING
        return [
            ReserveMemory(event.key, event.memory_bytes),
            RecordState(event.key, Recorded.RECEIVING),
        ]

    def _on_opening(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, StateNotRecorded):
            self.phase, self.key = P.IDLE, None
            return [DiscardImage(event.reason), Reply(Answer.UNKNOWN, event.reason)]
        assert isinstance(event, StateRecorded)
        self.phase = P.RECEIVING
        return [Reply(Answer.UNKNOWN)]

    def _on_receiving(self, event: DestEvent) -> list[DestCommand]:
        match event:
            case OpenRequested(resume=True):
                self.phase = P.JOINING
                return [JoinStreams()]
            case OpenRequested(key):
                # A repeated Open of this attempt finds the same memory, as long as its streams are whole.
                same = key == self.key and self.phase is P.RECEIVING
                return [Reply(Answer.UNKNOWN)] if same else self._replace(event)
            case StreamBroken(reason) if self._link_timeout_ms:
                return self._lose_link(reason)
            case StreamBroken(reason) | IntakeFailed(reason):
                return self._abort(reason, reply=None)
            case AbortRequested(_, reason):
                return self._abort(reason)
            case PrepareRequested():
                self._prepare = event
                self.phase = P.VERIFYING
                return [VerifyImage(event.image_digest, event.chunks)]
        raise LocalProtocolError(f"unhandled {event}")

    def _lose_link(self, reason: str) -> list[DestCommand]:
        if self.phase is P.LINK_LOST:
            return []  # another stream of the same connection
        self.phase = P.LINK_LOST
        return [Note("link_lost", {"reason": reason, "link_timeout_ms": self._link_timeout_ms})]

    def _on_joining(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, IntakeFailed):
            return self._abort(event.reason, reply=None)
        self.phase = P.RECEIVING
        return [Note("link_resumed", {}), Reply(Answer.UNKNOWN)]

    # -- preparing -----------------------------------------------------------------------------

    def _on_verifying(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, ImageRefused):
            return self._abort(event.reason)
        assert self.key is not None
        assert self._prepare is not None
        if self._prepare.rehearsal:
            self._verified_digest = self._prepare.image_digest
            return [KeepEvidence(), *self._abort("a rehearsal", reply=Answer.VERIFIED)]
        self.phase = P.RESTORING
        return [RestoreGuest(self.key)]

    def _on_restoring(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, ImageRefused):
            return self._abort(event.reason)
        self.phase = P.RECORDING_PREPARED
        assert self.key is not None
        return [RecordState(self.key, Recorded.PREPARED)]

    def _on_recording_prepared(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, StateNotRecorded):
            return self._abort(event.reason)
        assert isinstance(event, StateRecorded)
        self.phase = P.PREPARED
        return [Note("prepared", {}), Reply(Answer.PREPARED)]

    def _on_prepared(self, event: DestEvent) -> list[DestCommand]:
        assert self.key is not None
        match event:
            case StreamBroken():
                return []  # the pages are in; only the source's word counts now
            case AbortRequested(_, reason):
                return self._abort(reason)
            case OpenRequested():
                return self._replace(event)
            case PrepareRequested():
                if event.rehearsal:
                    raise RemoteProtocolError(f"attempt {self.key} is prepared, it is no rehearsal")
                self._check_same_image(event.image_digest)
                return [Reply(Answer.PREPARED)]
            case CommitRequested(_, image_digest):
                self._check_same_image(image_digest)
                self.phase = P.CONFIRMING
                return [ConfirmGuest(self.key)]
        raise LocalProtocolError(f"unhandled {event}")

    def _replace(self, event: OpenRequested) -> list[DestCommand]:
        """Give the attempt at hand up for a new one, where it is certain that nobody needs it any more.

        A later attempt of the same migration proves that its source burned this one. Another migration may
        come in only where nothing was promised and nobody sends.
        """
        assert self.key is not None
        later = event.key.migration == self.key.migration and event.key.attempt > self.key.attempt
        abandoned = self.phase is P.RECEIVING and event.idle and event.key.migration != self.key.migration
        if not (later or abandoned):
            raise RemoteProtocolError(f"attempt {self.key} is {self.phase.name} here; {event.key} must wait")
        self._next_open = event
        return self._abort(f"replaced by attempt {event.key}", reply=None)

    def _check_same_image(self, image_digest: int) -> None:
        assert self._prepare is not None
        if image_digest != self._prepare.image_digest:
            raise RemoteProtocolError(
                f"digest {image_digest:016x} is not the prepared image's {self._prepare.image_digest:016x}"
            )

    # -- the decision --------------------------------------------------------------------------

    def _on_confirming(self, event: DestEvent) -> list[DestCommand]:
        if isinstance(event, ImageRefused):
            return self._abort(event.reason)
        self.phase = P.RECORDING_COMMITTED
        assert self.key is not None
        return [RecordState(self.key, Recorded.COMMITTED)]

    def _on_recording_committed(self, event: DestEvent) -> list[DestCommand]:
        assert self.key is not None
        match event:
            case StateRecorded():
                self.phase = P.STARTING
                return [Note("committed", {}), RunGuest(self.key)]
            case StateNotRecorded(reason):
                return [Reply(Answer.UNKNOWN, reason)]
            case CommitRequested(_, image_digest):
                self._check_same_image(image_digest)
                return [RecordState(self.key, Recorded.COMMITTED)]
        return []

    def _on_starting(self, event: DestEvent) -> list[DestCommand]:
        """The guest is ours; whoever asks has it started again, until it runs or its process is gone."""
        assert self.key is not None
        match event:
            case GuestStarted():
                self.phase = P.COMMITTED
                return [Reply(Answer.COMMITTED)]
            case GuestStartFailed(reason, lost):
                if lost:
                    self.phase = P.COMMITTED
                    return [Note("guest_lost", {"reason": reason}), Reply(Answer.COMMITTED, reason)]
                return [Reply(Answer.UNKNOWN, f"committed, and the guest does not run yet: {reason}")]
            case CommitRequested(_, image_digest):
                self._check_same_image(image_digest)
                return [RunGuest(self.key)]
            case AbortRequested():
                return [Reply(Answer.COMMITTED)]
        return []

    def _on_committed(self, event: DestEvent) -> list[DestCommand]:
        match event:
            case StreamBroken():
                return []
            case CommitRequested(_, image_digest):
                self._check_same_image(image_digest)
                return [Reply(Answer.COMMITTED)]
            case ForgetRequested(key):
                return [ForgetAttempt(key), Reply(Answer.COMMITTED)]
            case GuestGivenAway(guest_epoch):
                assert self.key is not None
                if guest_epoch < self.key.next_epoch:
                    raise LocalProtocolError(f"epoch {self.key.next_epoch} runs here, not {guest_epoch}")
                self.phase, self.key = P.IDLE, None
                return self._forget_guest(event)
        return [Reply(Answer.COMMITTED)]

    def _forget_guest(self, event: GuestGivenAway) -> list[DestCommand]:
        self._given_epoch = max(self._given_epoch, event.guest_epoch)
        return []

    # -- giving up -----------------------------------------------------------------------------

    def _abort(self, reason: str, *, reply: Answer | None = Answer.ABORTED) -> list[DestCommand]:
        assert self.key is not None
        self._abort_reason, self._reply_when_aborted = reason, reply
        self.phase = P.ABORTING
        return [DiscardImage(reason), RecordState(self.key, Recorded.ABORTED, reason)]

    def _on_aborting(self, event: DestEvent) -> list[DestCommand]:
        if not isinstance(event, StateRecorded):
            return self._still_aborting(event)
        self.phase = P.ABORTED
        answer = self._reply_when_aborted
        note = (
            Note("rehearsed", {})
            if answer is Answer.VERIFIED
            else Note("aborted", {"reason": self._abort_reason})
        )
        if self._next_open is not None:
            return [note, *self._on_open(self._next_open)]
        return [note] if answer is None else [note, Reply(answer, self._abort_reason)]

    def _still_aborting(self, event: DestEvent) -> list[DestCommand]:
        """Everything of the attempt is discarded, and the journal did not take it yet."""
        assert self.key is not None
        match event:
            case StateNotRecorded(reason):
                self._next_open = None
                return [Reply(Answer.UNKNOWN, reason)]
            case OpenRequested(key) if key == self.key:
                raise RemoteProtocolError(f"attempt {key} was aborted: {self._abort_reason}")
            case OpenRequested():
                self._next_open = event
            case _:
                self._reply_when_aborted = self._reply_when_aborted or Answer.ABORTED
        return [RecordState(self.key, Recorded.ABORTED, self._abort_reason)]

    def _on_aborted(self, event: DestEvent) -> list[DestCommand]:
        match event:
            case OpenRequested(key):
                if key == self.key:
                    raise RemoteProtocolError(f"attempt {key} was aborted: {self._abort_reason}")
                return self._on_open(event)
            case ForgetRequested(key):
                self.phase, self.key = P.IDLE, None
                return [ForgetAttempt(key), Reply(Answer.ABORTED)]
            case PrepareRequested(image_digest=digest, rehearsal=True) if self._verified_digest == digest:
                return [Reply(Answer.VERIFIED, self._abort_reason)]
        return [Reply(Answer.ABORTED, self._abort_reason)]
