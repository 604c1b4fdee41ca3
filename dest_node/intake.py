"""One host taking guests in: drives the destination machine and carries its orders out.

Rule 1: one call at a time moves the machine (a lock); pages flow beside it, under the receiver's own rules.
Rule 2: RAM that a failed attempt touched is made zero again before anybody may use it.
Rule 3: the guest runs only after COMMITTED is durable, and is told DONE by the device that took its balloon over.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import structlog

from dest_node.alarm import Alarm
from dest_node.outcomes import IntakeRefused, Outcomes
from dest_node.page_receiver import PageReceiver
from dest_node.reached import reach_after, reach_before
from dest_node.read_back import ReadBack
from dest_node.recovery import aborted_image, committed_image, last_given_epoch
from dest_node.room import check_room
from host.ballooned import give_back
from host.clock import now_ns
from host.errors import AgentError, AgentLost, HostError, JournalConflict
from host.guest_memory import HostRam
from host.resources import cpu_seconds
from migration import commands as do
from migration import events as told
from migration.codec import image_digest
from migration.dest_machine import DestMachine
from migration.dest_phases import RESUMABLE_PHASES, DestPhase
from migration.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dest_node.page_receiver import PageStreamIn
    from host.context import HostContext
    from migration.identity import AttemptKey
    from migration.pb import migration_pb2

SILENCE_S = 10.0  # Prepare follows the last page, and the stream follows Open, within milliseconds
# A source counts its link timeout from when it noticed the loss: twice its keepalive after us, at most.
NOTICE_S = 10.0
# No chunk on any open stream: twice what a node is held at a point, and far more than a guest is waited for.
STREAM_SILENCE_S_MAX = 120.0
TAKE_OVER_S_MAX = 10.0  # one request to the agent, and a file of 8 bytes a page
JOIN_TIMEOUT_S = 10.0  # a writer stores one chunk in about a millisecond; it ends before it takes another

log = structlog.get_logger()


@dataclass(slots=True)
class StreamEnd:
    """How a page stream ended: what we refused of it, else why it was cut, else by the source's half-close."""

    broken: str
    refused: str = ""


class Intake:
    """Thread-safe. Methods are the calls of the Migration service, with plain arguments."""

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._machine = DestMachine()
        self._outcomes = Outcomes(host.journal, host.name)
        self._receiver: PageReceiver | None = None
        self._incarnation = ""  # of the attempt's memory, also once the guest has taken it over
        self._fresh: HostRam | None = None  # for the attempt that is being opened
        self._asked = 1, "full", 0  # of that attempt: streams, integrity, link_timeout_ms
        self._prepare: migration_pb2.PrepareRequest | None = None
        self._restored = False
        self._resolution = ""
        self._silence = Alarm(self._lock, self._silent)
        self._silence_s = SILENCE_S
        self._reply = do.Reply(told.Answer.UNKNOWN)
        self._read_back = ReadBack(host.artefacts_dir)
        self._unrecorded = ""  # why the journal did not take what the event at hand asked for
        self._taking_over: threading.Thread | None = None
        self.verify_ns = 0
        self.resume_ns = 0

    # -- calls ---------------------------------------------------------------------------------

    def open(
        self,
        key: AttemptKey,
        memory_bytes: int,
        integrity: str,
        *,
        streams: int = 1,
        resume: bool = False,
        link_timeout_ms: int = 0,
    ) -> tuple[str, list[int]]:
        """Reserve zeroed memory; returns its incarnation, and per stream how many chunks are stored.

        With `resume` go on with the memory of this very attempt, every older stream joined.

        Raises:
            IntakeRefused: no standby agent, or no room.
            RemoteProtocolError: another attempt is at hand that this one may not replace, or nothing to resume.
        """
        with self._lock:
            asked = streams, integrity, link_timeout_ms
            if key == self._machine.key and self._machine.phase in RESUMABLE_PHASES and asked != self._asked:
                raise RemoteProtocolError(f"attempt {key} was opened with {self._asked}, not {asked}")
            if resume:
                return self._resume(told.OpenRequested(key, memory_bytes, resume=True))
            if key != self._machine.key:
                self._outcomes.check_new(key)
                held = os.fstat(self._receiver.ram.fd).st_blocks * 512 if self._receiver is not None else 0
                idle = self._machine.phase is DestPhase.IDLE
                if idle or self._machine.phase is DestPhase.ABORTED:
                    self._drop_image()
                check_room(self._host, memory_bytes, held_bytes=held, must_stand_by=idle)
            idle = self._receiver is None or not self._receiver.streaming
            # Made beforehand, so that a host without memory refuses before anything has changed. It is all hole.
            self._fresh = HostRam.create(memory_bytes)
            earlier, self._asked = self._asked, asked
            try:
                self._call(told.OpenRequested(key, memory_bytes, idle, link_timeout_ms=link_timeout_ms))
            except BaseException:
                self._asked = earlier
                raise
            finally:
                if self._fresh is not None:
                    self._fresh.close()
                    self._fresh = None
            self._silence_s = SILENCE_S if not link_timeout_ms else link_timeout_ms / 1000 + NOTICE_S
            return self._opened()

    def _resume(self, event: told.OpenRequested) -> tuple[str, list[int]]:
        self._call(event)
        if self._receiver is None:
            raise RemoteProtocolError(f"attempt {event.key} was aborted: {self._machine.abort_reason}")
        return self._opened()

    def _opened(self) -> tuple[str, list[int]]:
        assert self._receiver is not None, "an opened attempt has memory"
        self._expect_life()
        return self._receiver.incarnation, self._receiver.stored_below

    def receiver(self) -> PageReceiver:
        """Where this attempt's chunks go."""
        with self._lock:
            if self._receiver is None or self._machine.phase is not DestPhase.RECEIVING:
                raise RemoteProtocolError(f"no pages are expected in phase {self._machine.phase.name}")
            return self._receiver

    def stream_ended(self, receiver: PageReceiver, stream: PageStreamIn, end: StreamEnd) -> None:
        """A stream that fed `receiver` is over, see StreamEnd."""
        with self._lock:
            # One that was joined is of a connection that was given up: news of it come late and mean nothing.
            if receiver is not self._receiver or stream.joined:
                return
            event = told.IntakeFailed(end.refused) if end.refused else told.StreamBroken(end.broken)
            if event.reason and self._machine.allows(type(event)):
                self._drive(event)
            if self._machine.phase in RESUMABLE_PHASES:
                self._expect_life()

    def _expect_life(self) -> None:
        """Give the attempt up if nobody sends and nobody prepares for a while."""
        self._silence.set(self._silence_s)

    def _silent(self) -> None:
        if self._receiver is None:
            return
        receiving = self._machine.phase is DestPhase.RECEIVING
        if receiving and self._receiver.streaming:
            limit_s = max(STREAM_SILENCE_S_MAX, self._silence_s)
            if now_ns() - self._receiver.heard_ns < limit_s * 1e9:
                self._expect_life()
                return
            self._drive(told.IntakeFailed(f"the source's streams were open and silent for {limit_s:g} s"))
        elif receiving or self._machine.phase is DestPhase.LINK_LOST:
            self._drive(told.IntakeFailed(f"the source was silent for {self._silence_s:g} s"))

    def prepare(self, key: AttemptKey, request: migration_pb2.PrepareRequest) -> do.Reply:
        """Verify, restore, record PREPARED."""
        with self._lock:
            if key == self._machine.key:
                if self._incarnation and request.incarnation != self._incarnation:
                    raise RemoteProtocolError("Prepare names another incarnation of this memory")
                if self._machine.phase in RESUMABLE_PHASES:
                    self._prepare = request
            return self._call(
                told.PrepareRequested(
                    key, request.incarnation, request.image_digest, request.chunks, request.rehearsal
                )
            )

    def commit(self, key: AttemptKey, digest: int, resolution: str = "") -> do.Reply:
        """The decision; `resolution` says why an operator makes it where the source cannot."""
        with self._lock:
            self._resolution = resolution
            if key != self._machine.key and (answer := self._outcomes.answer(key)) is not None:
                return answer
            return self._call(told.CommitRequested(key, digest))

    def abort(self, key: AttemptKey, reason: str) -> do.Reply:
        """The source gives up."""
        with self._lock:
            if key != self._machine.key and (answer := self._outcomes.answer(key)) is not None:
                return answer
            return self._call(told.AbortRequested(key, reason))

    def forget(self, key: AttemptKey) -> None:
        """The source knows the outcome."""
        with self._lock:
            if key != self._machine.key:
                self._outcomes.forget(key)
            elif self._machine.allows(told.ForgetRequested):
                self._drive(told.ForgetRequested(key))

    def stop(self) -> None:
        """The host ends: an attempt that is only being received is given up."""
        self._silence.cancel()
        self.settled(TAKE_OVER_S_MAX)
        with self._lock:
            if self._machine.phase in RESUMABLE_PHASES:
                self._drive(told.IntakeFailed("the destination node is stopping"))

    def recover_journal(self) -> None:
        """What was received is gone with the process, also where the agent still holds an image of it."""
        self._drive(told.GuestGivenAway(last_given_epoch(self._host.journal.entries("source"))))
        for entry in self._host.journal.unfinished("dest"):
            why = "the destination node restarted"
            self._read_back.drop_draft()
            self._host.journal.move(entry.key, "dest", {entry.state}, "ABORTED", detail=why)
            self._host.events.add("aborted", attempt=str(entry.key), reason=why)

    def recover_guest(self) -> None:
        """Run what was committed; have the agent drop an image whose attempt was aborted."""
        with self._lock:
            guest, entries = self._host.guest, self._host.journal.entries("dest")
            hello = guest.hello()
            if (entry := committed_image(entries, hello)) is not None:
                if hello.state == "restored":
                    self._start(entry.key)
                self._read_back.keep()
                self._host.balloon.hints_done()
            elif aborted_image(entries, hello) is not None:
                guest.link.discard()
            elif hello.state == "restored":
                self._host.events.add("image_unexplained", guest_epoch=hello.guest_epoch)
            self._outcomes.guest_recovered()

    def stood_by(self) -> None:
        """The guest that ran here was given away and is let go of: another one may come."""
        with self._lock:
            self._drive(told.GuestGivenAway(last_given_epoch(self._host.journal.entries("source"))))
            self._receiver, self._prepare, self._restored = None, None, False

    # -- the machine ---------------------------------------------------------------------------

    def _call(self, event: told.DestEvent) -> do.Reply:
        """Drive it for a source that waits. Raises IntakeRefused where the journal did not take what it needs."""
        reply = self._drive(event)
        if self._unrecorded:
            raise IntakeRefused(
                f"the journal of host {self._host.name} cannot be written ({self._unrecorded}): "
                "give it room and ask again"
            )
        return reply

    def _drive(self, event: told.DestEvent) -> do.Reply:
        self._reply, self._unrecorded = do.Reply(told.Answer.UNKNOWN), ""
        pending = list(self._machine.handle(event))
        while pending:
            command = pending.pop(0)
            reach_before(self._host.points, command)
            answer = self._carry_out(command)
            reach_after(self._host.points, command)
            if answer is not None:
                assert not pending, "an order that is answered is the last of its list"
                pending = list(self._machine.handle(answer))
        return self._reply

    def _carry_out(  # noqa: C901, PLR0911, PLR0912 - one arm per order
        self, command: do.DestCommand
    ) -> told.DestEvent | None:
        match command:
            case do.ReserveMemory(key, memory_bytes):
                assert self._fresh is not None, "memory is reserved by open alone"
                self._receiver = PageReceiver(self._fresh, key.attempt, streams=self._asked[0])
                self._incarnation = self._receiver.incarnation
                self._fresh = None
                self._read_back.clear()
                self._host.events.add("memory_reserved", memory_bytes=memory_bytes, cpu_seconds=cpu_seconds())
            case do.JoinStreams():
                return self._join_streams()
            case do.RecordState():
                return self._record(command)
            case do.VerifyImage(digest, chunks):
                return self._answered(lambda: self._verify(digest, chunks), told.ImageVerified())
            case do.KeepEvidence():
                self._read_back.keep()
            case do.RestoreGuest(key):
                return self._answered(lambda: self._restore(key), told.GuestRestored())
            case do.ConfirmGuest(key):
                return self._answered(lambda: self._confirm(key), told.GuestConfirmed())
            case do.RunGuest(key):
                return self._run_guest(key)
            case do.DiscardImage():
                self._discard()
            case do.ForgetAttempt(key):
                self._host.journal.forget(key, "dest")
            case do.Reply():
                self._reply = command
            case do.Note(name, fields):
                self._host.events.add(name, **fields, **self._measured(name))
            case _ as never:
                assert_never(never)
        return None

    def _measured(self, name: str) -> dict[str, object]:
        """What this host adds to a note of the machine."""
        match name:
            case "prepared":
                return {"verify_ms": self.verify_ns / 1e6}
            case "link_lost" | "link_resumed":
                assert self._receiver is not None, "a link without memory behind it"
                return {"stored_chunks": sum(self._receiver.stored_below)}
            case _:
                return {}

    @staticmethod
    def _answered(action: Callable[[], None], success: told.DestEvent) -> told.DestEvent:
        try:
            action()
        except (HostError, RemoteProtocolError, OSError) as error:
            return told.ImageRefused(" ".join(str(error).split()))
        except Exception as error:
            # Whatever it was, the attempt has to end: a machine that waits for its answer would never move again.
            log.exception("image_refused")
            return told.ImageRefused(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return success

    def _record(self, command: do.RecordState) -> told.StateRecorded | told.StateNotRecorded:
        journal, key, state = self._host.journal, command.key, command.state
        # A write that failed may be there all the same: what a state may follow includes the state itself.
        before = {told.Recorded.PREPARED: {"RECEIVING"}, told.Recorded.COMMITTED: {"PREPARED"}}
        digest = None
        if state is told.Recorded.PREPARED:
            assert self._prepare is not None, "PREPARED without a Prepare"
            digest = self._prepare.image_digest
        detail = self._resolution if state is told.Recorded.COMMITTED else command.reason
        try:
            if state is told.Recorded.RECEIVING:
                journal.begin(key, "dest", state.value)
            else:
                expected = before.get(state, {"RECEIVING", "PREPARED"}) | {state.value}
                journal.move(key, "dest", expected, state.value, digest=digest, detail=detail)
        except (sqlite3.Error, JournalConflict, OSError) as error:
            self._unrecorded = " ".join(str(error).split())
            self._host.events.add("journal_failed", state=state.value, reason=self._unrecorded)
            return told.StateNotRecorded(self._unrecorded)
        return told.StateRecorded(state)

    # -- orders --------------------------------------------------------------------------------

    def _join_streams(self) -> told.StreamsJoined | told.IntakeFailed:
        assert self._receiver is not None, "nothing was received"
        if not self._receiver.join_streams(JOIN_TIMEOUT_S):
            return told.IntakeFailed("a page writer of the lost connection does not end")
        return told.StreamsJoined()

    def _verify(self, digest: int, chunks: int) -> None:
        receiver, request = self._receiver, self._prepare
        assert receiver is not None, "nothing was received"
        assert request is not None, "no Prepare at hand"
        if not receiver.join(JOIN_TIMEOUT_S):
            raise IntakeRefused("a page writer does not end")
        self._host.events.add(
            "pages_received",
            chunks=receiver.stored_chunks,
            unpack_cpu_seconds=receiver.unpack_cpu_ns / 1e9,
            cpu_seconds=cpu_seconds(),
        )
        if receiver.stored_chunks != chunks:
            raise RemoteProtocolError("chunks are missing", stored=receiver.stored_chunks, sent=chunks)
        device = request.device.SerializeToString(deterministic=True)
        found = image_digest(receiver.stored_hashes, request.vcpu_state, device)
        if found != digest:
            raise RemoteProtocolError(
                "the image digest differs", found=f"{found:016x}", sent=f"{digest:016x}"
            )
        started_ns = now_ns()
        if self._asked[1] == "full":
            hashes = receiver.ram.hash_pages()
            pfn = receiver.difference(hashes)
            if pfn is not None:
                raise IntakeRefused(f"page {pfn} does not read back as it was stored")
            self._read_back.write(hashes)
        self.verify_ns = now_ns() - started_ns

    def _restore(self, key: AttemptKey) -> None:
        receiver, request = self._receiver, self._prepare
        assert receiver is not None, "nothing was received"
        assert request is not None, "no Prepare at hand"
        self._host.balloon.adopt_state(request.device, receiver.ram.pages)
        ballooned = self._host.balloon.ballooned(receiver.ram.pages)
        if ballooned.any():
            give_back(receiver.ram, ballooned, receiver.stored_hashes)
        self._restored = True  # from here on a failure must discard what the agent may hold
        device = {
            "features": request.device.features,
            "num_pages": request.device.num_pages,
            "actual": request.device.actual,
            "poison_value": request.device.poison_value,
            "ring_bases": list(request.device.ring_bases),
        }
        restored = self._host.guest.link.restore(key.next_epoch, request.vcpu_state, device, receiver.ram.fd)
        if restored.image_pages != receiver.ram.pages:
            raise IntakeRefused(f"the agent mapped {restored.image_pages} of {receiver.ram.pages} pages")

    def _confirm(self, key: AttemptKey) -> None:
        hello = self._host.guest.hello()
        # An image that does not run yet is of the epoch that is being given away.
        if hello.state != "restored" or hello.guest_epoch != key.guest_epoch:
            raise IntakeRefused(f"the guest agent holds no image of {key}: it is {hello.state}")

    def _run_guest(self, key: AttemptKey) -> told.GuestStarted | told.GuestStartFailed:
        try:
            self._start(key)
        except (AgentError, AgentLost) as error:
            # COMMITTED is durable: the guest is ours, and nobody else may run it.
            return told.GuestStartFailed(str(error), lost=self._image_gone())
        # Behind the answer: the source's clock of the downtime runs until it comes.
        self._taking_over = threading.Thread(target=self._take_over, name="take-over", daemon=True)
        self._taking_over.start()
        return told.GuestStarted()

    def _image_gone(self) -> bool:
        """Whether the process that held the image has ended: nobody listens, or one that never had a guest."""
        guest = self._host.guest
        try:
            return guest.process_gone or guest.hello().state == "standby"
        except (AgentError, AgentLost):
            return guest.process_gone

    def _start(self, key: AttemptKey) -> None:
        """Have the agent run the image."""
        started_ns = now_ns()
        at_ns = self._host.guest.link.run(key.next_epoch)
        self._restored = False
        self.resume_ns = now_ns() - started_ns
        self._host.events.add(
            "guest_running", at_ns=at_ns, guest_epoch=key.next_epoch, resume_ms=self.resume_ns / 1e6
        )

    def _take_over(self) -> None:
        """From here on this is the guest's host: its device says DONE, and it has RAM from the agent, as any."""
        with self._lock:
            try:
                self._host.balloon.hints_done()
                self._host.events.add("hints_done")
                if self._receiver is not None:
                    self._receiver.ram.close()
                    self._receiver = None
                self._read_back.keep()
                self._host.guest.take_ram()
            except (HostError, OSError) as error:
                self._host.events.add("take_over_failed", reason=str(error))

    def settled(self, timeout_s: float) -> None:
        """Wait until a guest that was started is taken over whole: its RAM here, what was read back kept."""
        if (taking_over := self._taking_over) is not None:
            taking_over.join(timeout_s)

    def _discard(self) -> None:
        """Nothing of the attempt may stay; and nothing here may fail, or the attempt could never end."""
        receiver, self._receiver, self._incarnation = self._receiver, None, ""
        try:
            self._read_back.drop_draft()
        except OSError as error:
            self._host.events.add("draft_stays", reason=str(error))
        if receiver is not None and not receiver.abandon(JOIN_TIMEOUT_S):
            self._host.events.add("page_writer_stuck", chunks=receiver.stored_chunks)
        self._drop_image()

    def _drop_image(self) -> None:
        """Have the agent drop what it may hold; one that does not hear it is told again before the next attempt."""
        if self._restored:
            try:
                self._host.guest.link.discard()
                self._restored = False
            except (AgentError, AgentLost) as error:
                self._host.events.add("discard_unheard", reason=str(error))
