"""The source role as its host knows it: one migration at a time, and its artefacts."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

from host.roles import RoleRefused
from host.trackers import choose
from migration.events import Skip
from migration.identity import AttemptKey
from migration.rounds import Limits
from source_node.migration_run import MigrationRun, Order

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

    from host.context import HostContext
    from migration.pb import node_pb2

STOP_TIMEOUT_S = (
    30.0  # a cancelled migration resumes its guest within milliseconds; a dead peer takes longest
)
ARTEFACTS = ("source_hashes", "frames", "sent")
INTEGRITY = ("full", "stream")


class SourceRole:
    """Registered as "source"."""

    name = "source"

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._run: MigrationRun | None = None

    def register(self, server: grpc.Server) -> None:
        """A source serves nothing to its peer: it only calls."""

    def recover(self) -> None:
        """An attempt that never reached COMMITTING is over: burn it, then let the guest run on."""
        for entry in self._host.journal.unfinished("source"):
            if entry.state == "COMMITTING":
                # Only the destination may decide (migration/source_machine.py, rule 5).
                self._host.events.add("attempt_undecided", attempt=str(entry.key), detail=entry.detail)
                continue
            self._host.journal.move(
                entry.key, "source", {entry.state}, "ABORTED", detail="the source node restarted"
            )
            self._host.guest.link.resume(entry.key.guest_epoch)
            self._host.balloon.hints_done()
            self._host.events.add(
                "attempt_aborted", attempt=str(entry.key), reason="the source node restarted"
            )

    def start_migration(self, request: node_pb2.MigrateRequest) -> None:
        """Check everything that can be checked beforehand, then begin.

        Raises:
            ValueError: a field of the request is not possible.
            RoleRefused: the host's or the guest's state does not allow it.
            TrackerUnavailable: the dirty tracker asked for cannot work here.
        """
        order = self._order(request)
        with self._lock:
            if self._run is not None and not self._run.ended:
                raise RoleRefused(f"migration {self._run.order.key} is still under way")
            self._run = MigrationRun(self._host, order)
            self._run.start()

    def cancel(self, reason: str) -> tuple[bool, str]:
        """Ask the running migration to stop."""
        with self._lock:
            if self._run is None or self._run.ended:
                raise RoleRefused("no migration is under way")
            return self._run.cancel(reason or "cancelled by request")

    def artefact(self, name: str) -> Path | None:
        """Files that a completed migration left."""
        path = self._host.artefacts_dir / name
        return path if name in ARTEFACTS and path.exists() else None

    def stop(self) -> None:
        """Cancel what is under way and wait for its end, for a bounded time."""
        with self._lock:
            run = self._run
        if run is not None:
            run.cancel("the source node is stopping")
            run.join(STOP_TIMEOUT_S)

    def _order(self, request: node_pb2.MigrateRequest) -> Order:
        guest = self._host.guest
        if not guest.ready or guest.ram is None:
            raise RoleRefused("no running guest on this host")
        hello = guest.hello()
        if hello.state != "running":
            raise RoleRefused(f"the guest is {hello.state}, not running")
        skip = Skip(request.skip)
        if request.integrity not in INTEGRITY:
            raise ValueError(f"integrity {request.integrity!r} is none of {', '.join(INTEGRITY)}")
        tracker, why = choose(request.tracker, guest.write_protect_reason, hints=skip.uses_hints)
        if skip.uses_hints and (refusal := self._host.balloon.status().hints_refusal):
            raise RoleRefused(refusal)
        return Order(
            key=AttemptKey(request.migration, request.attempt, hello.guest_epoch),
            dest_address=request.dest_address,
            skip=skip,
            tracker=tracker,
            tracker_reason=why,
            integrity=request.integrity,
            hint_wait_ms=request.hint_wait_ms,
            limits=Limits(
                rounds_max=request.rounds_max,
                downtime_limit_ms=request.downtime_limit_ms,
                timeout_ms=request.timeout_ms or math.inf,
                on_rounds_max="cancel" if request.on_rounds_max == "cancel" else "switch",
                bandwidth=request.bandwidth_bytes_per_second or None,
            ),
        )
