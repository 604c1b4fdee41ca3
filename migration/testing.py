"""The pair harness: a source and a destination machine joined in memory, with a guest of plain arrays.

Public, like the mock driver of virtio: whoever changes a machine plays it through here first. The harness
carries out orders the way the real shells do, only without processes, sockets and clocks, and it lets a test
interfere between any two of them. Memory is one u64 per page (its content); hashes are the contents.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

import numpy as np

from migration import commands as do
from migration import events as told
from migration.dest_machine import DestMachine
from migration.errors import RemoteProtocolError
from migration.identity import AttemptKey
from migration.pages import BoolArray, U64Array
from migration.rounds import Limits
from migration.source_machine import SourceMachine

_NO_PAGES: U64Array = np.empty(0, np.uint64)
Hook: TypeAlias = Callable[["MachinePair", do.SourceCommand], None]


@dataclass(slots=True)
class ToyGuest:
    """Pages as words, and who runs it. `free` pages are what the guest would hint."""

    memory: U64Array
    dirty: BoolArray
    free: BoolArray
    running_at: str = "source"

    def write(self, pfn: int, value: int) -> None:
        """A write of the running guest: content and dirty log, and the page is in use."""
        assert self.running_at == "source", "a paused guest writes nothing"
        self.memory[pfn] = value
        self.dirty[pfn] = True
        self.free[pfn] = False


@dataclass(slots=True)
class ToyDestination:
    """What the destination's shell holds."""

    memory: U64Array
    named: BoolArray
    chunks: int = 0  # stored so far
    journal: list[str] = field(default_factory=list)
    restored: bool = False
    running: bool = False
    evidence: U64Array | None = None  # what it read back, kept of a rehearsal


class MachinePair:
    """Runs one attempt to its end. `before` is called with every source command before it is carried out.

    `window`: so many chunks are on the way, sent and not stored, whenever there may be; `cut` loses them.
    """

    def __init__(
        self,
        pages: int = 64,
        *,
        skip: told.Skip = told.Skip.NONE,
        limits: Limits | None = None,
        before: Hook | None = None,
        hints_late: bool = False,
        attempt: int = 1,
        guest: ToyGuest | None = None,
        rehearsal: bool = False,
        window: int = 0,
    ) -> None:
        self.key = AttemptKey("m", attempt, 1)
        self.pages = pages
        self.skip = skip
        self.rehearsal = rehearsal
        self.limits = limits or Limits(downtime_limit_ms=0.0)
        self.source = SourceMachine()
        self.dest_machine = DestMachine()
        self.guest = guest or ToyGuest(
            np.arange(1, pages + 1, dtype=np.uint64), np.zeros(pages, np.bool_), np.zeros(pages, np.bool_)
        )
        self.dest = ToyDestination(np.zeros(pages, np.uint64), np.zeros(pages, np.bool_))
        self.events: deque[told.SourceEvent] = deque()
        self.log: list[do.SourceCommand] = []
        self.source_journal: list[str] = []
        self.outcome: do.EndMigration | None = None
        self.guest_frozen = False
        self.hints_told_done = False
        self.hints_late = hints_late
        self.timers: dict[told.Timer, int] = {}  # -> when, in ms
        self.link_up = True
        self.window = window
        self.on_the_way: deque[tuple[U64Array, U64Array]] = (
            deque()
        )  # chunks sent and not stored: pages, content
        self.sent = np.zeros(pages, np.uint64)  # the content that was sent last, page by page
        self.sendings = np.zeros(pages, np.uint64)  # how often each page was sent
        self.sent_chunks = 0
        self._batch = _NO_PAGES  # ordered, and not sent
        self._awaiting = False  # acknowledgements
        self.throttle_percent = 0
        self.dest_starts_fail = 0
        self.now_ns = 0
        self._before = before or (lambda _pair, _command: None)
        self._command_id = 0

    def run_until_commit_is_sent(self) -> None:
        """Stops just before the first Commit leaves: what a source that dies there leaves behind."""

        def stop(_pair: MachinePair, command: do.SourceCommand) -> None:
            if isinstance(command, do.SendCommit):
                raise StopIteration

        self._before = stop
        with contextlib.suppress(StopIteration):
            self.run()

    def run(self, first: told.SourceEvent | None = None, *, steps_max: int = 10_000) -> str:
        """Feeds events until the source machine ends; its outcome. Timers fire when nothing else happens."""
        request = told.MigrationRequested(
            self.key, self.pages, self.skip, self.limits, hint_wait_ms=100, rehearsal=self.rehearsal
        )
        self.tell(first or request)
        for _ in range(steps_max):
            if self.source.ended:
                assert self.outcome is not None, "a machine that ended said how"
                return self.outcome.outcome
            if self.events:
                self.tell(self.events.popleft())
            elif self.timers:
                timer = min(self.timers, key=self.timers.__getitem__)
                self.now_ns = max(self.now_ns, self.timers.pop(timer) * 1_000_000)
                self.tell(told.TimerFired(timer))
            else:
                raise AssertionError(f"stuck in {self.source.phase.name} after {self.log[-1:]}")
        raise AssertionError(f"no end within {steps_max} steps, in {self.source.phase.name}")

    def tell(self, event: told.SourceEvent) -> None:
        """One event in, every command of it carried out."""
        self.now_ns += 1_000_000
        for command in self.source.handle(event, self.now_ns):
            self._before(self, command)
            self.log.append(command)
            self._carry_out(command)

    def count(self, kind: type) -> int:
        """How many commands of this kind the machine gave."""
        return sum(isinstance(command, kind) for command in self.log)

    # -- the source's shell --------------------------------------------------------------------

    def _carry_out(self, command: do.SourceCommand) -> None:  # noqa: C901, PLR0912, PLR0915 - one arm per order
        post = self.events.append
        match command:
            case do.RecordState(_, state):
                self.source_journal.append(state.value)
                post(told.StateRecorded(state))
            case do.OpenDestination(key):
                opening = told.OpenRequested(key, self.pages, link_timeout_ms=self.limits.link_timeout_ms)
                self._to_dest(opening, lambda _: told.DestinationOpened("one"))
            case do.StartTracking():
                self.guest.dirty[:] = False
                post(told.TrackingStarted())
            case do.Harvest():
                post(told.Harvested(self._harvest()))
            case do.OpenHints():
                self._command_id += 1
                post(told.HintsOpened(self._command_id))
                if not self.hints_late:
                    post(self.hint_report())
            case do.CloseHints():
                last = self.hint_report() if self.hints_late else told.HintsReported(self._command_id)
                post(told.HintsClosed(last))
            case do.EndHints():
                self.hints_told_done = True
            case do.ArmTimer(timer, delay_ms):
                self.timers[timer] = self.now_ns // 1_000_000 + delay_ms
            case do.DisarmTimer(timer):
                self.timers.pop(timer, None)
            case do.SendPages(_, pfns):
                self._send(pfns)
            case do.AwaitAcknowledgements():
                self._acknowledge()
            case do.PauseGuest():
                self.guest.running_at = "nobody"
                post(told.GuestPaused())
            case do.SaveGuest():
                post(told.GuestSaved(_digest(self.sent)))
            case do.SendPrepare(key, digest, rehearsal):
                prepare = told.PrepareRequested(key, "one", digest, self.sent_chunks, rehearsal)
                self._to_dest(prepare, lambda reply: told.PrepareAnswered(reply.answer, reply.reason))
            case do.SendCommit(key, digest):
                answer = lambda reply: told.CommitAnswered(reply.answer, reply.reason)  # noqa: E731
                self._to_dest(told.CommitRequested(key, digest), answer)
            case do.KeepEvidence():
                assert self.guest.running_at == "nobody", "evidence of memory that changes"
                post(told.EvidenceKept())
            case do.ThrottleGuest(percent):
                self.throttle_percent = percent
            case do.ResumeDestination(key):
                resume = told.OpenRequested(key, self.pages, resume=True)
                self._to_dest(resume, lambda _: told.DestinationResumed((self.dest.chunks,)))
            case do.ResumeStreams(stored_below):
                self._resume_streams(stored_below[0])
            case do.ResumeGuest():
                assert "ABORTED" in self.source_journal, "resumed before ABORTED was recorded"
                assert not self.dest.running, "resumed while the destination runs the guest"
                self.guest.running_at = "source"
                post(told.GuestResumed())
            case do.FreezeGuest():
                self.guest_frozen = True
            case do.AbortDestination(key, reason):
                self._to_dest(told.AbortRequested(key, reason), None)
            case do.ForgetDestination(key):
                self._to_dest(told.ForgetRequested(key), None)
            case do.EndMigration():
                self.outcome = command
            case do.Note():
                pass
            case _ as never:
                assert_never(never)

    def _harvest(self) -> BoolArray:
        dirty = self.guest.dirty.copy()
        self.guest.dirty[:] = False
        return dirty

    def hint_report(self) -> told.HintsReported:
        """What the guest hints now: every free page, one by one, and STOP."""
        free = np.flatnonzero(self.guest.free).astype(np.uint64)
        return told.HintsReported(self._command_id, free, np.ones(free.size, np.uint64), stopped=True)

    def _send(self, pfns: U64Array) -> None:
        """Every batch is one chunk here: it goes out whole or not at all."""
        self._batch = pfns
        if not self.link_up:
            return  # until the streams are resumed
        self._batch = _NO_PAGES
        self._send_chunk(pfns)
        self.events.append(told.PagesSent(len(pfns), 0, len(pfns) * 4096))

    def _send_chunk(self, pfns: U64Array) -> None:
        self.sent[pfns] = self.guest.memory[pfns]
        self.sendings[pfns] += 1
        self.sent_chunks += 1
        self.on_the_way.append((pfns, self.guest.memory[pfns]))
        self._store(leave=self.window)

    def _store(self, *, leave: int) -> None:
        while self.link_up and len(self.on_the_way) > leave:
            pfns, content = self.on_the_way.popleft()
            self.dest.memory[pfns] = content
            self.dest.named[pfns] = True
            self.dest.chunks += 1

    def _acknowledge(self) -> None:
        self._store(leave=0)
        self._awaiting = not self.link_up
        if self.link_up:
            self.events.append(told.AllAcknowledged())

    def cut(self, reason: str = "the link was cut") -> None:
        """The connection breaks: what is on the way is lost, and both ends hear of it."""
        self.link_up = False
        self.events.append(told.LinkLost(reason))
        if self.dest_machine.allows(told.StreamBroken):
            self.drive_dest(told.StreamBroken(reason))

    def heal(self) -> None:
        """Connections are possible again."""
        self.link_up = True

    def _resume_streams(self, stored: int) -> None:
        """What was lost is read and sent again, then what was under way."""
        assert stored == self.sent_chunks - len(self.on_the_way), "the destination stored what was lost"
        lost = np.unique(np.concatenate([_NO_PAGES, *(pfns for pfns, _ in self.on_the_way)]))
        self.on_the_way.clear()
        self.sent_chunks = stored
        self.events.append(told.StreamsResumed(len(lost)))
        if not self.link_up:
            return
        if len(lost):
            self._send_chunk(lost)
        if len(self._batch):
            self._send(self._batch)
        if self._awaiting:
            self._acknowledge()

    def digest(self) -> int:
        """Stands for the image digest of what is at the destination."""
        return _digest(self.dest.memory)

    # -- the wire and the destination's shell --------------------------------------------------

    def _to_dest(self, event: told.DestEvent, answer: Callable[[do.Reply], told.SourceEvent] | None) -> None:
        if not self.link_up:
            self.events.append(told.LinkLost("the link is down"))
            return
        try:
            reply = self.drive_dest(event)
        except RemoteProtocolError as error:
            self.events.append(told.PeerLost(str(error)))
            return
        if answer is not None:
            self.events.append(answer(reply))

    def drive_dest(self, event: told.DestEvent) -> do.Reply:  # noqa: C901, PLR0912 - one arm per order
        """One call or fact at the destination, to its reply."""
        reply = do.Reply(told.Answer.UNKNOWN)
        pending = list(self.dest_machine.handle(event))
        while pending:
            command = pending.pop(0)
            follow: told.DestEvent | None = None
            match command:
                case do.RecordState(_, state):
                    self.dest.journal.append(state.value)
                    follow = told.StateRecorded(state)
                case do.ReserveMemory():
                    self.dest.memory[:] = 0
                    self.dest.named[:] = False
                case do.VerifyImage(digest, chunks):
                    good = digest == self.digest() and chunks == self.dest.chunks
                    follow = told.ImageVerified() if good else told.ImageRefused("digest differs")
                case do.JoinStreams():
                    follow = told.StreamsJoined()
                case do.RestoreGuest():
                    self.dest.restored = True
                    follow = told.GuestRestored()
                case do.ConfirmGuest():
                    follow = told.GuestConfirmed() if self.dest.restored else told.ImageRefused("no image")
                case do.RunGuest():
                    assert self.dest.journal[-1] == "COMMITTED", "ran before COMMITTED was recorded"
                    assert self.guest.running_at == "nobody", "two owners"
                    follow = told.GuestStarted()
                    if self.dest_starts_fail:
                        self.dest_starts_fail -= 1
                        follow = told.GuestStartFailed("the agent is busy", lost=False)
                    else:
                        self.guest.running_at = "dest"
                        self.dest.running = True
                case do.KeepEvidence():
                    self.dest.evidence = self.dest.memory.copy()
                case do.DiscardImage():
                    self.dest.restored = False
                    self.dest.memory[:] = 0
                    self.dest.named[:] = False
                case do.Reply():
                    reply = command
                case do.ForgetAttempt() | do.Note():
                    pass
                case _ as never:
                    assert_never(never)
            if follow is not None:
                pending += self.dest_machine.handle(follow)
        return reply


def _digest(content: U64Array) -> int:
    return hash(content.tobytes()) & (2**64 - 1)
