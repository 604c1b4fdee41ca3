"""The hands of the source role in virtual time: source_node/shell.py, order by order, with the bugs to be planted.

Rule 1: the order of effects is the real shell's; what fails is told as the real shell tells it.
Rule 2: an order that takes time blocks the run, as it blocks the real migration's one thread.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, assert_never

from host.ballooned import ballooned_for_good, pack
from host.trackers import UffdTracker
from migration import commands as do
from migration import events as told
from migration.codec import image_digest
from migration.handover import Handover
from migration.page_bits import PageBits
from migration.source_phases import SourcePhase
from source_node.packer import packers
from source_node.page_reader import PageReader
from testbed.sim.errors import AgentGone, AgentRefused, DeviceNotReady
from testbed.sim.left_out import LeftOut
from testbed.sim.network import Lost, Refusal
from testbed.sim.orders import Order, Prepare
from testbed.sim.page_lanes import SimStreams
from testbed.sim.plants import Plant
from testbed.sim.world import MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.hint_batch import HintBatch
    from migration.identity import AttemptKey
    from migration.pages import U64Array
    from testbed.sim.node import Node
    from testbed.sim.source_host import SourceRun

OPEN_NS, PREPARE_NS, COMMIT_NS = 1_500 * MS, 3_000 * MS, 800 * MS
FAREWELL_NS = 500 * MS
CLOSE_NS = 60 * MS
ARMING_NS = 4 * MS
LATE_NEWS, LATE_NEWS_NS = 0.04, 20 * MS  # a stream's thread had to wait before it could tell


class Scanner:
    """The kernel's write protection as host/pagemap.py gives it."""

    def __init__(self, shell: SourceShell) -> None:
        self._shell = shell

    def scan_and_protect(self) -> PageBits:
        """Pages written since the last time."""
        guest = self._shell.guest
        dirty = PageBits.of(guest.written)
        if self._shell.node.world.plant is not Plant.DIRTY_BIT_CLEARED_AFTER_READ or not self._shell.tracking:
            guest.written[:] = False
        return dirty


class SourceShell:
    """One attempt's hands."""

    def __init__(self, run: SourceRun, node: Node, order: Order) -> None:
        assert node.agent.guest is not None, "a migration needs a guest"
        self.run = run
        self.node = node
        self.order = order
        self.guest = node.agent.guest
        self.tracking = False
        self.hints_asked = False
        self.news_overtaken = False  # the next news of the streams comes after that of a reset
        self._calls: list[Any] = []
        self._streams: SimStreams | None = None
        self._reader: PageReader | None = None
        self._tracker: UffdTracker | None = None
        self._incarnation = ""
        self._prepare: Prepare | None = None
        self._kept_id = 0  # planted: the one command id
        self._left_out = LeftOut(node, self.guest)
        node.balloon.sink = self._hinted

    def _hinted(self, batch: HintBatch) -> None:
        if self.node.world.plant is Plant.DIRTY_LOG_CLEARED_AT_HINT:
            self._forget_dirty(batch)
        self.run.post(batch.reported())

    def _forget_dirty(self, batch: HintBatch) -> None:
        for first, count in zip(batch.pfn_first.tolist(), batch.page_count.tolist(), strict=True):
            self.guest.written[first : first + count] = False

    def carry_out(self, command: do.SourceCommand) -> None:  # noqa: C901, PLR0912, PLR0915 - one arm per order
        """Does it, and tells the run what came of it. Raises what a refusal is here."""
        node, agent = self.node, self.node.agent
        match command:
            case do.RecordState():
                self._record(command)
            case do.OpenDestination():
                self._open(resume=False)
            case do.ResumeDestination():
                self._open(resume=True)
            case do.ResumeStreams(stored_below):
                lost = self._lanes.resume(stored_below)
                self.run.post(told.StreamsResumed(len(lost)))
            case do.ThrottleGuest(percent):
                agent.throttle(percent)
            case do.StartTracking():
                self._start_tracking()
            case do.Harvest():
                self._harvest()
            case do.OpenHints():
                self._open_hints()
            case do.CloseHints():
                self._close_hints()
            case do.EndHints():
                if node.world.plant is not Plant.DONE_FORGOTTEN_ON_CANCEL:
                    node.balloon.hints_done()
            case do.ArmTimer(timer, delay_ms):
                self.run.arm(timer, delay_ms)
            case do.DisarmTimer(timer):
                self.run.disarm(timer)
            case do.SendPages(round_index, pfns):
                self._left_out.check(round_index, pfns)
                self._lanes.send(round_index, pfns)
            case do.AwaitAcknowledgements():
                round_set = self.run.machine.round_set
                self._lanes.await_acknowledgements(round_set.index if round_set else 0)
            case do.PauseGuest():
                agent.pause()
                node.balloon.serve_out()
                self.run.post(told.GuestPaused())
            case do.SaveGuest(rehearsal):
                self._save(rehearsal)
            case do.SendPrepare():
                self._send_prepare()
            case do.SendCommit(key, digest):
                self._send_commit(key, digest)
            case do.KeepEvidence():
                self.run.post(told.EvidenceKept())
            case do.ResumeGuest(key):
                self._resume(key)
            case do.FreezeGuest():
                self._freeze()
            case do.AbortDestination(key, reason):
                if node.world.plant is not Plant.PREPARE_REPLAYED_AFTER_RESUME:
                    self._farewell(lambda intake: intake.abort(key, reason))
            case do.ForgetDestination(key):
                self._farewell(lambda intake: intake.forget(key))
            case do.Note():
                pass
            case do.EndMigration():
                self.run.finish(command)
            case _ as never:
                assert_never(never)

    @property
    def _lanes(self) -> SimStreams:
        assert self._streams is not None, "no page stream was opened"
        return self._streams

    # -- orders --------------------------------------------------------------------------------

    def _record(self, command: do.RecordState) -> None:
        journal, key, state = self.node.journal, command.key, command.state
        if state is told.Recorded.STARTED:
            journal.begin(key, "source", state.value, detail=self.order.integrity)
        elif state is told.Recorded.COMPLETED:
            journal.move(key, "source", {"COMMITTING"}, state.value)
        elif state is told.Recorded.COMMITTING:
            assert self._prepare is not None, "COMMITTING without a Prepare"
            journal.move(key, "source", {"STARTED"}, state.value, digest=self._prepare.image_digest)
        else:
            journal.move(key, "source", {"STARTED", "COMMITTING"}, state.value, detail=command.reason)
        self.run.post(told.StateRecorded(state))

    def _call(
        self,
        serve: Callable[[Any], Any],
        answered: Callable[[Any], told.SourceEvent],
        limit_ns: int,
        *,
        first: bool = False,
    ) -> None:
        def done(answer: Any) -> None:
            match answer:
                case Lost(reason, came):
                    self.run.post(told.PeerLost(reason) if first and not came else told.LinkLost(reason))
                case Refusal(reason):
                    self.run.post(told.PeerLost(reason))
                case _:
                    self._answered(answered(answer))

        self._calls.append(self.node.peer_call(serve, done, limit_ns))

    def _answered(self, event: told.SourceEvent) -> None:
        prepared = isinstance(event, told.PrepareAnswered) and event.answer is told.Answer.PREPARED
        if self.run.over and prepared and self.node.world.plant is Plant.PREPARE_REPLAYED_AFTER_RESUME:
            assert self._prepare is not None, "an answer without its question"
            key, digest = self.order.key, self._prepare.image_digest
            self.node.peer_call(lambda intake: intake.commit(key, digest), lambda _: None, COMMIT_NS)
        self.run.post(event)

    def _open(self, *, resume: bool) -> None:
        order, pages = self.order, self.guest.ram.pages

        def opened(answer: tuple[str, tuple[int, ...]]) -> told.SourceEvent:
            incarnation, stored_below = answer
            if resume and incarnation != self._incarnation:
                return told.PeerLost(
                    "the destination goes on with another memory than the one that was sent to"
                )
            self._incarnation = incarnation
            return told.DestinationResumed(stored_below) if resume else told.DestinationOpened(incarnation)

        first = not self._calls
        self._call(lambda intake: intake.open(order, pages, resume=resume), opened, OPEN_NS, first=first)

    def _start_tracking(self) -> None:
        node = self.node
        self._reader = PageReader(
            self.guest.ram,  # type: ignore[arg-type]  # the same face
            incarnation=self._incarnation,
            attempt=self.order.key.attempt,
            detects_zero=self.order.skip.detects_zero,
        )
        packed = packers(self.order.packing, self.order.streams, self.guest.ram.pages)
        streams = SimStreams(node.world, node, node.peer_stream, self._reader, packed)
        streams.sent = self._pages_sent
        streams.acknowledged = lambda: self._tell_in_time(told.AllAcknowledged())
        streams.lost = lambda reason, refused: self.run.post(
            told.PeerLost(reason) if refused else told.LinkLost(reason)
        )
        streams.was_read = self._was_read
        self._streams = streams
        self.run.blocked = True
        self._left_out.tracking_ordered()
        node.world.after(self.run.dice.randrange(1, ARMING_NS), self._armed, node)

    def _armed(self) -> None:
        """The streams were open while the tracker was armed."""
        assert self._reader is not None, "tracking is being started"
        self.run.blocked = False
        balloon, scanner = self.node.balloon, Scanner(self)
        self._tracker = UffdTracker(scanner, balloon.log, balloon.ballooned)  # type: ignore[arg-type]
        self._tracker.start()
        self.tracking = True
        self._reader.find_holes()
        left_out = self._left_out.tracking_started()
        self.run.post(told.TrackingStarted(left_out, Handover(prepare=self.order.handover_ms)))

    def _pages_sent(self, sent: told.PagesSent) -> None:
        self._tell_in_time(sent)

    def _tell_in_time(self, event: told.SourceEvent) -> None:
        """At once, as a rule; other news may overtake it, such as that the link went at this very moment."""
        dice = self.run.dice
        if self.news_overtaken or dice.random() < LATE_NEWS:
            if self.news_overtaken:
                self.node.network.reset("connection reset")
            self.news_overtaken = False
            late_ns = dice.choice((MS // 5, MS, LATE_NEWS_NS))
            self.node.world.after(dice.randrange(1, late_ns), lambda: self.run.post(event), self.node)
        else:
            self.run.post(event)

    def _was_read(self, pfns: U64Array) -> None:
        if self.node.world.plant is Plant.DIRTY_BIT_CLEARED_AFTER_READ:
            guest = self.guest

            def clear() -> None:
                guest.written[pfns] = False

            self.node.world.after(MS, clear, self.node)

    def _harvest(self) -> None:
        assert self._tracker is not None, "tracking was not started"
        is_last = self.run.machine.phase is SourcePhase.FINAL_HARVESTING
        self.run.post(self._left_out.harvested(self._tracker, last=is_last))

    def _open_hints(self) -> None:
        balloon = self.node.balloon
        self.hints_asked = True
        if self._kept_id:
            self.run.post_first(told.HintsOpened(self._kept_id))
            return
        try:
            command_id = balloon.open_hints()
        except DeviceNotReady:
            self.run.post_first(told.HintsReported(0, stopped=True))
            self.run.post_first(told.HintsOpened(0))
            return
        if self.node.world.plant is Plant.HARVEST_WHILE_ID_OPEN:
            self._kept_id = command_id
        self.run.post_first(told.HintsOpened(command_id))

    def _close_hints(self) -> None:
        if self._kept_id:
            self.run.post(told.HintsClosed(told.HintsReported(self._kept_id)))
            return
        last = self.node.balloon.close_hints()
        if self.node.world.plant is Plant.DIRTY_LOG_CLEARED_AT_HINT:
            self._forget_dirty(last)
        self.run.post(told.HintsClosed(last.reported()))

    def _save(self, rehearsal: bool) -> None:
        vcpu_state = b"" if rehearsal else self.node.agent.save()
        device = self.node.balloon.device_state()
        self.run.blocked = True
        told_already = False

        def closed(in_order: bool) -> None:
            nonlocal told_already
            if self.run.over or told_already:
                return
            told_already, self.run.blocked = True, False
            if not in_order:
                self._lanes.cancel()  # every chunk is acknowledged: Prepare will show what became of the link
            self._saved(vcpu_state, device, rehearsal)
            self.run.go_on()

        self._lanes.close(closed)
        self.node.world.after(CLOSE_NS, lambda: closed(False), self.node)

    def _saved(self, vcpu_state: bytes, state: dict[str, Any], rehearsal: bool) -> None:
        assert self._reader is not None, "tracking was not started"
        assert self._tracker is not None, "tracking was not started"
        held = self.node.balloon.ballooned(self.guest.ram.pages)
        ballooned = ballooned_for_good(held, self._reader.sent_hashes, self._tracker.left_out)
        device = json.dumps({**state, "ballooned": pack(ballooned).hex()}, sort_keys=True).encode()
        digest = image_digest(self._reader.sent_hashes, vcpu_state, device)
        self._prepare = Prepare(
            self.order.key,
            self._incarnation,
            digest,
            vcpu_state,
            device,
            self._lanes.sent_chunks,
            rehearsal,
        )
        self.run.post(told.GuestSaved(digest))

    def _send_prepare(self) -> None:
        prepare = self._prepare
        assert prepare is not None, "Prepare before the guest was saved"
        self._call(
            lambda intake: intake.prepare(prepare),
            lambda reply: told.PrepareAnswered(reply.answer, reply.reason),
            PREPARE_NS,
        )

    def _send_commit(self, key: AttemptKey, digest: int) -> None:
        self._call(
            lambda intake: intake.commit(key, digest),
            lambda reply: told.CommitAnswered(reply.answer, reply.reason),
            COMMIT_NS,
        )

    def _resume(self, key: AttemptKey) -> None:
        """The guest must not stay paused because its agent was silent: ask until it answers or is gone."""
        agent = self.node.agent
        try:
            agent.resume(key.guest_epoch)
        except AgentGone:
            if not agent.alive:
                raise
            self.run.blocked = True
            self.node.world.after(5 * MS, lambda: self._resume_again(key), self.node)
        else:
            self.run.post(told.GuestResumed())

    def _resume_again(self, key: AttemptKey) -> None:
        self.run.blocked = False
        self.run.carry_out(do.ResumeGuest(key), seen=False)
        self.run.go_on()

    def _freeze(self) -> None:
        try:
            self.node.agent.freeze()
        except (AgentGone, AgentRefused) as error:
            self.node.world.say(self.node.name, f"freeze failed: {error}")

    def _farewell(self, serve: Callable[[Any], Any]) -> None:
        if self._streams is not None and not self._lanes_over():
            self._lanes.cancel()
        self.node.peer_call(serve, lambda _: None, FAREWELL_NS)

    def _lanes_over(self) -> bool:
        return self._streams is None or self._streams._over  # noqa: SLF001 - one shell in two files

    def release(self) -> None:
        """Let go of everything; nobody hears of it any more."""
        if self._streams is not None:
            self._streams.cancel()
        if self.node.world.plant is not Plant.PREPARE_REPLAYED_AFTER_RESUME:
            for call in self._calls:
                call.forget()
        self.node.balloon.sink = lambda _: None
