"""The source role as its host knows it: one migration at a time, and its artefacts."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from host.dirty_rate import check_periods
from host.roles import RoleRefused
from host.trackers import choose
from migration.events import Answer, Skip
from migration.handover import NO_STOP, LastStop
from migration.identity import AttemptKey
from migration.partition import STREAMS_MAX
from migration.rounds import Limits
from source_node.aftermath import tell_end
from source_node.attempt_note import AttemptNote
from source_node.dirty_rate import measured_dirty_rate
from source_node.farewells import Farewells
from source_node.migration_run import MigrationRun
from source_node.order import Order, compression_of, limits_of
from source_node.page_stream import default_streams
from source_node.recovery import given_away_by, to_take_up, turned_back, untold

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

    from host.agent_link import Hello
    from host.context import HostContext
    from migration.pb import node_pb2

STOP_TIMEOUT_S = (
    30.0  # a cancelled migration resumes its guest within milliseconds; a dead peer takes longest
)
ARTEFACTS = ("source_hashes", "frames", "sent")
INTEGRITY = ("full", "stream")
PORTABLE_KIND = "ballast"  # of a guest whose RAM and vCPU state are all there is of it


class SourceRole:
    """Registered as "source"."""

    name = "source"

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._run: MigrationRun | None = None
        self._last_stop = NO_STOP  # of the guests that this process has given away, or kept
        self._measuring = False  # the dirty log is read by somebody else than a migration
        self._stopping = threading.Event()
        self._farewells = Farewells(host)

    def register(self, server: grpc.Server) -> None:
        """A source serves nothing to its peer: it only calls."""

    def recover_journal(self) -> None:
        """An attempt that never reached COMMITTING is over: burn it before anybody is answered."""
        for entry in self._host.journal.unfinished("source"):
            if entry.state != "COMMITTING":
                why = "the source node restarted"
                note = AttemptNote.read(entry.detail).ended(why)
                self._host.journal.move(entry.key, "source", {entry.state}, "ABORTED", detail=note.text)
                self._host.events.add("attempt_aborted", attempt=str(entry.key), reason=why)

    def recover_guest(self) -> None:
        """Ask for the outcome of an attempt that was COMMITTING; let the guest of an aborted one run on."""
        with self._lock:
            if self._run is not None and not self._run.ended:
                return  # it looks after its guest itself
        entries, guest = self._host.journal.entries("source"), self._host.guest
        pending = to_take_up(entries)
        if pending is not None and pending.digest is not None:
            self._take_up(pending.key, AttemptNote.read(pending.detail), pending.digest)
        elif entries:
            hello = guest.hello()
            if (entry := turned_back(entries, hello.guest_epoch)) is not None:
                if hello.kind == PORTABLE_KIND and hello.state in {"paused", "running"}:
                    guest.link.throttle(0)  # the process that would have lifted it is gone
                if hello.state == "paused":
                    guest.link.resume(hello.guest_epoch)
                    self._host.events.add("guest_resumed", attempt=str(entry.key))
                self._host.balloon.hints_done()
            if (unsaid := untold(entries)) is not None:
                tell_end(self._host, unsaid, hello)
        self._farewells.begin()

    def why_not_resume(self) -> str:
        """The guest's fate is a migration's while one is under way, and the destination's after COMMITTING."""
        with self._lock:
            if self._run is not None and not self._run.ended:
                return f"migration {self._run.order.key} is under way"
        entry = given_away_by(self._host.journal.entries("source"), self._host.guest.hello().guest_epoch)
        return f"the guest was given away by {entry.key}" if entry is not None else ""

    def why_not_stand_by(self, hello: Hello) -> str:
        """Only a guest that is another host's by the journal is let go of, its evidence kept."""
        with self._lock:
            if self._run is not None and not self._run.ended:
                return f"migration {self._run.order.key} is under way"
        entry = given_away_by(self._host.journal.entries("source"), hello.guest_epoch)
        if entry is None or entry.state != "COMPLETED":
            return f"the guest is {hello.state} and was not given away: it is let go of nowhere else"
        return ""

    def stood_by(self) -> None:
        """What the last migration held of the guest goes as well."""
        with self._lock:
            self._last_stop = self._known_stop()
            self._run = None

    def _known_stop(self) -> LastStop:
        return self._run.last_stop if self._run is not None else self._last_stop

    def _take_up(self, key: AttemptKey, note: AttemptNote, image_digest: int) -> None:
        address, server_name = note.address
        order = Order(
            key=key,
            dest_address=address,
            dest_server_name=server_name,
            skip=Skip.NONE,
            tracker="",
            tracker_reason="taken up after a restart",
            integrity="full",  # the guest's RAM is here and stands still: a judge may have its hashes
            hint_wait_ms=0,
            limits=Limits(),
        )
        with self._lock:
            self._run = MigrationRun(self._host, order, self._farewells.begin)
            self._run.take_up(image_digest)

    def start_migration(self, request: node_pb2.MigrateRequest) -> None:
        """Check everything that can be checked beforehand, then begin.

        Raises:
            ValueError: a field of the request is not possible.
            RoleRefused: the host's or the guest's state does not allow it.
            TrackerUnavailable: the dirty tracker asked for cannot work here.
        """
        order = self._order(request)
        with self._lock:
            self._require_idle()
            order = replace(order, last_stop=self._known_stop())
            self._run = MigrationRun(self._host, order, self._farewells.begin)
            self._run.start()

    def cancel(self, reason: str) -> tuple[bool, str]:
        """Ask the running migration to stop."""
        with self._lock:
            run = self._run
        if run is None or run.ended:
            raise RoleRefused("no migration is under way")
        return run.cancel(reason or "cancelled by request")

    def resolve(self, key: AttemptKey, verdict: Answer, image_digest: int, reason: str) -> str:
        """The destination's answer, by an operator: only for an attempt that waits for it. Raises RoleRefused."""
        entry = self._host.journal.get(key, "source")
        wanted = "COMPLETED" if verdict is Answer.COMMITTED else "ABORTED"
        if entry is None:
            raise RoleRefused(f"attempt {key} is not known here")
        if entry.state == wanted:
            return wanted
        with self._lock:
            run = self._run
        if entry.state != "COMMITTING" or run is None or run.order.key != key:
            raise RoleRefused(f"attempt {key} is {entry.state} here, and waits for nobody's answer")
        if not run.resolve(verdict, reason):
            raise RoleRefused(f"attempt {key} is just being recorded: ask again")
        run.join(STOP_TIMEOUT_S)
        resolved = self._host.journal.get(key, "source")
        return resolved.state if resolved is not None else ""

    def measure_dirty_rate(self, period_ms: int, periods: int) -> node_pb2.DirtyRateReply:
        """How fast the running guest dirties memory. No migration may begin meanwhile: there is one dirty log.

        Raises:
            ValueError: a field of the request is not possible.
            RoleRefused: the host's or the guest's state does not allow it.
        """
        check_periods(period_ms, periods)
        with self._lock:
            self._require_idle()
            self._running_guest()
            self._measuring = True
        try:
            return measured_dirty_rate(self._host, period_ms, periods, self._stopping)
        finally:
            self._measuring = False

    def _require_idle(self) -> None:
        if self._run is not None and not self._run.ended:
            raise RoleRefused(f"migration {self._run.order.key} is still under way")
        if self._measuring:
            raise RoleRefused("the guest's dirty rate is being measured")

    def _running_guest(self) -> Hello:
        guest = self._host.guest
        if not guest.ready or guest.ram is None:
            raise RoleRefused("no running guest on this host")
        hello = guest.hello()
        if hello.state != "running":
            raise RoleRefused(f"the guest is {hello.state}, not running")
        return hello

    def artefact(self, name: str) -> Path | None:
        """Files that a completed migration left."""
        path = self._host.artefacts_dir / name
        return path if name in ARTEFACTS and path.exists() else None

    def stop(self) -> None:
        """Cancel what is under way and wait for its end, for a bounded time."""
        self._stopping.set()
        with self._lock:
            run = self._run
        if run is not None:
            run.cancel("the source node is stopping")
            run.join(STOP_TIMEOUT_S)
        self._farewells.stop(STOP_TIMEOUT_S)

    def _order(self, request: node_pb2.MigrateRequest) -> Order:
        hello, guest = self._running_guest(), self._host.guest
        skip = Skip(request.skip)
        if request.integrity not in INTEGRITY:
            raise ValueError(f"integrity {request.integrity!r} is none of {', '.join(INTEGRITY)}")
        if hello.kind != PORTABLE_KIND and not request.rehearsal:
            raise RoleRefused(
                f"a guest of kind {hello.kind} cannot run elsewhere: only a rehearsal is possible"
            )
        limits = limits_of(request)
        if limits.throttle is not None and hello.kind != PORTABLE_KIND:
            raise RoleRefused(f"a guest of kind {hello.kind} cannot be throttled: use another on_stall")
        tracker, why = choose(
            request.tracker, guest.write_protect_reason, hints=skip.uses_hints, rehearsal=request.rehearsal
        )
        if request.unsafe_clear_dirty_log_at_hint and tracker != "uffd":
            raise ValueError(f"tracker {tracker} has no dirty log that could be cleared at a hint")
        if request.unsafe_clear_dirty_log_at_hint and not skip.uses_hints:
            raise ValueError(f"unsafe_clear_dirty_log_at_hint means nothing with skip {skip.value!r}")
        if skip.uses_hints and (refusal := self._host.balloon.status().hints_refusal):
            raise RoleRefused(refusal)
        if refusal := self._host.trust.why_not_call(request.dest_address, request.dest_server_name):
            raise RoleRefused(refusal)
        return Order(
            key=AttemptKey(request.migration, request.attempt, hello.guest_epoch),
            dest_address=request.dest_address,
            dest_server_name=request.dest_server_name,
            skip=skip,
            tracker=tracker,
            tracker_reason=why,
            rehearsal=request.rehearsal,
            integrity=request.integrity,
            hint_wait_ms=request.hint_wait_ms,
            streams=_streams(request.streams),
            unsafe_clear_dirty_log_at_hint=request.unsafe_clear_dirty_log_at_hint,
            compression=compression_of(request),
            delta_cache_bytes=request.delta_cache_bytes,
            limits=limits,
        )


def _streams(requested: int) -> int:
    if requested > STREAMS_MAX:
        raise ValueError(
            f"{requested} page streams: 1 to {STREAMS_MAX} are possible, or 0 to have them chosen"
        )
    return requested or default_streams(len(os.sched_getaffinity(0)))
