"""The destination role of a simulated node: dest_node/intake.py in virtual time, over the real PageReceiver.

Rule 1: one call at a time moves the machine; the order of effects is the real intake's.
Rule 2: pages are stored by the real receiver; streams that were joined are cut, and what of them still arrives
        is not stored (unless that very bug is planted).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from dest_node.outcomes import Outcomes
from dest_node.page_receiver import PageReceiver
from dest_node.recovery import aborted_image, committed_image, last_given_epoch
from host.ballooned import give_back
from migration import commands as do
from migration import events as told
from migration.codec import UNPACKED, decode_chunk, image_digest
from migration.dest_machine import DestMachine
from migration.dest_phases import RESUMABLE_PHASES, DestPhase
from migration.errors import ProtocolError, RemoteProtocolError
from migration.packing import unpack
from migration.pages import PAGE_BYTES, pfns_of
from testbed.sim import points
from testbed.sim.errors import (
    AgentGone,
    AgentRefused,
    CallRefused,
    JournalFull,
    JournalRefused,
    ViolationError,
)
from testbed.sim.guest import State
from testbed.sim.plants import Plant
from testbed.sim.ram import SimRam
from testbed.sim.world import MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from dest_node.page_receiver import PageStreamIn
    from migration.codec import DecodedChunk
    from migration.identity import AttemptKey
    from migration.pages import BoolArray
    from testbed.sim.network import Pipe
    from testbed.sim.node import Node
    from testbed.sim.orders import Order, Prepare

ACK_EVERY = 3
SILENCE_MS = 1_000  # the real one's is ten seconds
NOTICE_MS = 1_000  # likewise


class SimIntake:
    """One host taking guests in. Methods are the calls of the Migration service."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.machine = DestMachine()
        journal: Any = node.journal  # with the same fields as the real one
        self._outcomes = Outcomes(journal, node.name)
        self.receiver: PageReceiver | None = None
        self.received: tuple[Prepare, PageReceiver] | None = None
        self._fresh: tuple[SimRam, int] | None = None
        self._integrity = "full"
        self._prepare: Prepare | None = None
        self._restored = False
        self._unrecorded = ""  # why the journal did not take what the event at hand asked for
        self._silence: object = None
        self._silence_ms = SILENCE_MS
        self._reply = do.Reply(told.Answer.UNKNOWN)
        self._stored_in = ("", 0)  # which memory and round `_stored` is about
        self._stored: BoolArray

    # -- calls ---------------------------------------------------------------------------------

    def open(self, order: Order, pages: int, *, resume: bool) -> tuple[str, tuple[int, ...]]:
        """Reserve zeroed memory, or go on with what there is."""
        key, memory_bytes, link_timeout_ms = order.key, pages * PAGE_BYTES, order.limits.link_timeout_ms
        if resume:
            self._call(told.OpenRequested(key, memory_bytes, resume=True))
            if self.receiver is None:
                raise RemoteProtocolError(f"attempt {key} was aborted: {self.machine.abort_reason}")
            return self._opened()
        if key != self.machine.key:
            if (entry := self.node.journal.get(key, "dest")) is not None:
                raise CallRefused(f"attempt {key} was {entry.state} here before")
            if self.machine.phase in {DestPhase.IDLE, DestPhase.ABORTED}:
                self._drop_image()
            state = self.node.agent.hello()
            if state is not State.STANDBY and self.machine.phase is DestPhase.IDLE:
                raise CallRefused(f"the guest agent is {state.value}, not standby")
        idle = self.receiver is None or not self.receiver.streaming
        self._fresh = (SimRam(pages), order.streams)
        try:
            self._call(told.OpenRequested(key, memory_bytes, idle, link_timeout_ms=link_timeout_ms))
        finally:
            self._fresh = None
        self._integrity = order.integrity
        self._silence_ms = max(SILENCE_MS, link_timeout_ms + NOTICE_MS if link_timeout_ms else 0)
        return self._opened()

    def _opened(self) -> tuple[str, tuple[int, ...]]:
        assert self.receiver is not None, "an opened attempt has memory"
        self._expect_life()
        return self.receiver.incarnation, tuple(self.receiver.stored_below)

    def prepare(self, request: Prepare) -> do.Reply:
        """Verify, restore, record PREPARED."""
        if request.key == self.machine.key and self.receiver is not None:
            if request.incarnation != self.receiver.incarnation:
                raise RemoteProtocolError("Prepare names another incarnation of this memory")
            if self.machine.phase in RESUMABLE_PHASES:
                self._prepare = request
        return self._call(
            told.PrepareRequested(
                request.key, request.incarnation, request.image_digest, request.chunks, request.rehearsal
            )
        )

    def commit(self, key: AttemptKey, digest: int) -> do.Reply:
        """The decision."""
        if key != self.machine.key and (answer := self._outcomes.answer(key)) is not None:
            return answer
        return self._call(told.CommitRequested(key, digest))

    def abort(self, key: AttemptKey, reason: str) -> do.Reply:
        """The source gives up."""
        if key != self.machine.key and (answer := self._outcomes.answer(key)) is not None:
            return answer
        return self._call(told.AbortRequested(key, reason))

    def forget(self, key: AttemptKey) -> None:
        """The source knows the outcome."""
        if key != self.machine.key:
            self._outcomes.forget(key)
        elif self.machine.allows(told.ForgetRequested):
            self._drive(told.ForgetRequested(key))

    @property
    def prepared(self) -> Prepare | None:
        """The newest Prepare that was taken."""
        return self._prepare

    # -- streams -------------------------------------------------------------------------------

    def pages(self, pipe: Pipe) -> None:
        """A page stream begins."""
        receiver = self.receiver
        if receiver is None or self.machine.phase is not DestPhase.RECEIVING:
            pipe.close(f"no pages are expected in phase {self.machine.phase.name}", refused=True)
            return
        plant = self.node.world.plant
        try:
            stream = receiver.begin_stream(lambda: self._cut(pipe))
        except RemoteProtocolError as error:
            pipe.close(str(error), refused=True)
            return
        stored_since_ack = 0

        def at_dest(message: bytes) -> None:
            nonlocal stored_since_ack
            try:
                chunk = receiver.store(stream, message)
            except ProtocolError as error:
                if plant is Plant.LATE_CHUNK_STORED and stream.joined:
                    _store_anyway(receiver, message)
                    return
                pipe.close(str(error), refused=True)
                self._over(receiver, stream, "", f"bad page chunk: {error}")
                return
            self._not_twice(chunk)
            stored_since_ack += 1
            wanted = not chunk.data_page_count and not chunk.zero_page_count
            if wanted or stored_since_ack >= ACK_EVERY:
                stored_since_ack = 0
                assert stream.lane is not None, "a stored chunk has a lane"
                pipe.acknowledge(stream.lane.stored_below)

        def ended(reason: str) -> None:
            if not reason:
                pipe.close()
            self._over(receiver, stream, reason, "")

        pipe.at_dest, pipe.dest_ended = at_dest, ended
        pipe.accepted(self.node)

    def _not_twice(self, chunk: DecodedChunk) -> None:
        """What is stored is not sent again in its round (the issue's word on recovery)."""
        this = (chunk.header.incarnation, chunk.header.round_index)
        if this != self._stored_in:
            self._stored_in, self._stored = this, np.zeros(self.node.host.options.pages, np.bool_)
        runs = ((chunk.run_first, chunk.run_pages), (chunk.zero_first, chunk.zero_pages))
        for pfns in (pfns_of(first, count) for first, count in runs if len(first)):
            if self._stored[pfns].any():
                raise ViolationError(
                    "acknowledged pages are not sent again", f"round {chunk.header.round_index}"
                )
            self._stored[pfns] = True

    @staticmethod
    def _cut(pipe: Pipe) -> None:
        pipe.close("cut by the destination")

    def _over(self, receiver: PageReceiver, stream: PageStreamIn, broken: str, refused: str) -> None:
        receiver.end_stream(stream)
        if receiver is not self.receiver or stream.joined:
            return
        event = told.IntakeFailed(refused) if refused else told.StreamBroken(broken)
        if event.reason and self.machine.allows(type(event)):
            self._drive(event)
        if self.machine.phase in RESUMABLE_PHASES:
            self._expect_life()

    def _expect_life(self) -> None:
        mark = self._silence = object()

        def silent() -> None:
            if mark is not self._silence or self.receiver is None:
                return
            lost = self.machine.phase is DestPhase.LINK_LOST
            idle = self.machine.phase is DestPhase.RECEIVING and not self.receiver.streaming
            if lost or idle:
                self._drive(told.IntakeFailed("the source was silent"))

        self.node.world.after(self._silence_ms * MS, silent, self.node)

    # -- restart -------------------------------------------------------------------------------

    def recover_journal(self) -> None:
        """What was received is gone with the process."""
        self._drive(told.GuestGivenAway(self._last_given_epoch()))
        for entry in self.node.journal.unfinished("dest"):
            self.node.journal.move(entry.key, "dest", {entry.state}, "ABORTED", detail="the node restarted")

    def recover_guest(self) -> None:
        """Run what was committed; drop an image that was not."""
        agent = self.node.agent
        state = agent.hello()
        hello: Any = SimpleNamespace(state=state.value, guest_epoch=agent.epoch)
        entries: Any = self.node.journal.entries("dest")  # with the same fields as the real journal's
        entry = committed_image(entries, hello)
        if entry is not None:
            if state is State.RESTORED:
                agent.run(entry.key.next_epoch)
            self.node.balloon.hints_done()
        elif aborted_image(entries, hello) is not None:
            agent.discard()
        self._outcomes.guest_recovered()

    def stood_by(self) -> None:
        """What ran here was given away and is let go of: another guest may come."""
        self._drive(told.GuestGivenAway(self._last_given_epoch()))
        self.receiver, self._prepare, self._restored = None, None, False

    def _last_given_epoch(self) -> int:
        entries: Any = self.node.journal.entries("source")
        return last_given_epoch(entries)

    # -- the machine ---------------------------------------------------------------------------

    def _call(self, event: told.DestEvent) -> do.Reply:
        """Drive it for a source that waits."""
        reply = self._drive(event)
        if self._unrecorded:
            raise CallRefused(f"the journal cannot be written: {self._unrecorded}")
        return reply

    def _drive(self, event: told.DestEvent) -> do.Reply:
        self._reply, self._unrecorded = do.Reply(told.Answer.UNKNOWN), ""
        pending = self._handle(event)
        world = self.node.world
        while pending:
            command = pending.pop(0)
            seen = type(command) not in points.UNSEEN
            if seen:
                world.reach(points.before("dest", type(command)))
            answer = self._carry_out(command)
            if seen:
                world.reach(points.after("dest", type(command)))
            if answer is not None:
                assert not pending, "an order that is answered is the last of its list"
                pending = self._handle(answer)
        return self._reply

    def _handle(self, event: told.DestEvent) -> list[do.DestCommand]:
        world, machine = self.node.world, self.machine
        before = machine.phase
        commands = list(machine.handle(event))
        world.coverage[f"dest {before.name} {type(event).__name__} {machine.phase.name}"] += 1
        if world.transcript is not None:
            world.say(self.node.name, f"{type(event).__name__}: {before.name} -> {machine.phase.name}")
        return commands

    def _carry_out(self, command: do.DestCommand) -> told.DestEvent | None:  # noqa: PLR0911
        match command:
            case do.ReserveMemory(key):
                self._reserve(key)
            case do.JoinStreams():
                assert self.receiver is not None, "nothing was received"
                self.receiver.join_streams(1.0)
                stuck = self._writer_is_stuck()
                return told.IntakeFailed("a page writer does not end") if stuck else told.StreamsJoined()
            case do.RecordState():
                return self._record(command)
            case do.VerifyImage(digest, chunks):
                return _answered(lambda: self._verify(digest, chunks), told.ImageVerified())
            case do.RestoreGuest(key):
                return _answered(lambda: self._restore(key), told.GuestRestored())
            case do.ConfirmGuest(key):
                return _answered(lambda: self._confirm(key), told.GuestConfirmed())
            case do.RunGuest(key):
                return self._run_guest(key)
            case do.DiscardImage():
                self._discard()
            case do.ForgetAttempt(key):
                self.node.journal.forget(key, "dest")
            case do.Reply():
                self._reply = command
            case do.Note() | do.KeepEvidence():
                pass
            case _ as never:
                assert_never(never)
        return None

    def _reserve(self, key: AttemptKey) -> None:
        assert self._fresh is not None, "memory is reserved by open alone"
        ram, streams = self._fresh
        if self.node.world.plant is Plant.RETRY_WITHOUT_ZEROING and self.node.stale_ram is not None:
            ram.words[:] = self.node.stale_ram
        self.receiver = PageReceiver(ram, key.attempt, streams=streams)  # type: ignore[arg-type]
        self.receiver.incarnation = self.node.next_incarnation()

    def _record(self, command: do.RecordState) -> told.StateRecorded | told.StateNotRecorded:
        journal, key, state = self.node.journal, command.key, command.state
        before = {told.Recorded.PREPARED: {"RECEIVING"}, told.Recorded.COMMITTED: {"PREPARED"}}
        digest = None
        if state is told.Recorded.PREPARED:
            assert self._prepare is not None, "PREPARED without a Prepare"
            digest = self._prepare.image_digest
        durable = (
            state is not told.Recorded.COMMITTED or self.node.world.plant is not Plant.COMMIT_NOT_DURABLE
        )
        try:
            if state is told.Recorded.RECEIVING:
                journal.begin(key, "dest", state.value)
            else:
                expected = before.get(state, {"RECEIVING", "PREPARED"}) | {state.value}
                reason = command.reason
                journal.move(key, "dest", expected, state.value, digest=digest, detail=reason, sync=durable)
        except (JournalFull, JournalRefused) as error:
            self._unrecorded = str(error)
            return told.StateNotRecorded(self._unrecorded)
        return told.StateRecorded(state)

    def _verify(self, digest: int, chunks: int) -> None:
        receiver, request = self.receiver, self._prepare
        assert receiver is not None, "nothing was received"
        assert request is not None, "no Prepare at hand"
        receiver.join(1.0)
        if self._writer_is_stuck():
            raise AgentRefused("a page writer does not end")
        if receiver.stored_chunks != chunks:
            raise RemoteProtocolError("chunks are missing", stored=receiver.stored_chunks, sent=chunks)
        found = image_digest(receiver.stored_hashes, request.vcpu_state, request.device)
        if found != digest:
            raise RemoteProtocolError("the image digest differs")
        if self._integrity == "full":
            pfn = receiver.difference(receiver.ram.hash_pages())
            if pfn is not None:
                raise RemoteProtocolError("a page does not read back as it was stored", pfn=pfn)

    def _writer_is_stuck(self) -> bool:
        stuck, self.node.writer_stuck = self.node.writer_stuck, False
        return stuck

    def _restore(self, key: AttemptKey) -> None:
        receiver, request = self.receiver, self._prepare
        assert receiver is not None, "nothing was received"
        assert request is not None, "no Prepare at hand"
        balloon, ram = self.node.balloon, receiver.ram
        plant = self.node.world.plant
        balloon.adopt_state(request.device, ram.pages)
        ballooned = balloon.ballooned(ram.pages)
        if ballooned.any() and plant is not Plant.BALLOON_NOT_GIVEN_BACK:
            stored = ram.populated()
            give_back(ram, ballooned, receiver.stored_hashes)
            self.node.world.count("balloon given back by the next host", (stored & ~ram.populated()).any())
        self._restored = True
        self.node.agent.restore(key.guest_epoch, request.vcpu_state, ram)  # type: ignore[arg-type]

    def _confirm(self, key: AttemptKey) -> None:
        agent = self.node.agent
        if agent.hello() is not State.RESTORED or agent.epoch != key.guest_epoch:
            raise AgentRefused(f"the guest agent holds no image of {key}: it is {agent.state.value}")

    def _run_guest(self, key: AttemptKey) -> told.GuestStarted | told.GuestStartFailed:
        try:
            self.node.agent.run(key.next_epoch)
            self._restored = False
        except (AgentRefused, AgentGone) as error:
            return told.GuestStartFailed(str(error), lost=not self.node.agent.alive)
        self.node.balloon.hints_done()
        return told.GuestStarted()

    def _discard(self) -> None:
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            if self.node.world.plant is Plant.RETRY_WITHOUT_ZEROING:
                self.node.stale_ram = np.array(receiver.ram.words)
            receiver.abandon(1.0)
        self._drop_image()

    def _drop_image(self) -> None:
        if self._restored:
            try:
                self.node.agent.discard()
                self._restored = False
            except (AgentRefused, AgentGone) as error:
                self.node.world.say(self.node.name, f"discard unheard: {error}")


def _answered(action: Callable[[], None], success: told.DestEvent) -> told.DestEvent:
    try:
        action()
    except (AgentRefused, AgentGone, RemoteProtocolError) as error:
        return told.ImageRefused(str(error))
    return success


def _store_anyway(receiver: PageReceiver, message: bytes) -> None:
    """Planted: the data goes to memory, and into no book."""
    chunk = decode_chunk(message, pages=receiver.ram.pages)
    if chunk.data_page_count and len(chunk.data) == chunk.data_page_count * PAGE_BYTES:  # not packed
        receiver.ram.closed = False  # type: ignore[attr-defined]
        if chunk.packing is not UNPACKED:
            chunk = unpack(chunk, receiver.ram.gather)
        receiver.ram.store(chunk.run_first, chunk.run_pages, chunk.data)
