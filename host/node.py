"""The Node service: what the testbed may ask of one host (node.proto).

Rule 1: every answer is about this host alone; whatever spans two hosts is a role's.
Rule 2: errors carry one line: FAILED_PRECONDITION for a state, INVALID_ARGUMENT for a field, UNAVAILABLE for
        a guest agent that cannot be reached.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc

from host.balloon_server import STATS_S_MAX
from host.errors import AgentError, AgentLost, DeviceNotReady
from host.roles import GivesGuestsAway, Resolves, RoleRefused
from migration.events import Answer
from migration.identity import AttemptKey
from migration.pb import node_pb2, node_pb2_grpc

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Sequence

    from host.context import HostContext
    from host.roles import Role

PIECE_BYTES = 1 << 20
VERDICTS = ("COMMITTED", "ABORTED")
REPORTED_PACKAGES = ("ballast", "grpcio", "protobuf", "numpy", "xxhash")


class NodeService(node_pb2_grpc.NodeServicer):
    """One per process. `stop` is set by Shutdown, as by a signal; the main thread waits for it."""

    def __init__(
        self, context: HostContext, roles: Sequence[Role], migration_address: str, stop: threading.Event
    ) -> None:
        self._host = context
        self._roles = roles
        self._migration_address = migration_address
        self._stop = stop

    def Describe(  # noqa: N802 - the name is the schema's
        self, request: node_pb2.DescribeRequest, context: grpc.ServicerContext
    ) -> node_pb2.DescribeReply:
        """Versions, roles, what was probed."""
        facts = {
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "versions": {name: version(name) for name in REPORTED_PACKAGES},
            "tracker": {"uffd": self._host.guest.write_protect_reason, "hash": ""},
            "refused_calls": self._host.refused.counts(),
        }
        return node_pb2.DescribeReply(
            name=self._host.name,
            roles=[role.name for role in self._roles],
            migration_address=self._migration_address,
            facts_json=json.dumps(facts),
            pid=os.getpid(),
        )

    def Watch(  # noqa: N802
        self, request: node_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[node_pb2.NodeEvent]:
        """Everything that happened here, then what happens."""
        context.add_callback(self._host.events.wake)  # a watcher that went away must not occupy a thread
        for fact in self._host.events.watch(context.is_active):
            yield node_pb2.NodeEvent(at_ns=fact.at_ns, name=fact.name, fields_json=fact.fields_json)

    # -- the guest -----------------------------------------------------------------------------

    def GuestStatus(  # noqa: N802
        self, request: node_pb2.GuestStatusRequest, context: grpc.ServicerContext
    ) -> node_pb2.GuestStatusReply:
        """The agent's and the balloon device's account."""
        if not self._host.guest.attached:
            return node_pb2.GuestStatusReply(state="absent")
        with told(context):
            hello = self._host.guest.hello()
        device = self._host.balloon.status()
        return node_pb2.GuestStatusReply(
            state=hello.state,
            guest_epoch=hello.guest_epoch,
            pages=hello.pages,
            free_pages=hello.free_pages,
            ballooned_pages=hello.ballooned_pages,
            held_pages=hello.held_pages,
            cpu_seconds=hello.cpu_seconds,
            operations=hello.operations,
            balloon_ready=device.ready,
            num_pages=device.num_pages,
            actual=device.actual,
            workloads_json=json.dumps(hello.workloads),
            agent_pid=hello.pid,
            balloon_json=json.dumps({**asdict(device), "driver": hello.balloon}),
        )

    def PauseGuest(  # noqa: N802
        self, request: node_pb2.PauseGuestRequest, context: grpc.ServicerContext
    ) -> node_pb2.PauseGuestReply:
        """All threads, then the rings."""
        with told(context):
            self._host.guest.link.pause()
        return node_pb2.PauseGuestReply()

    def ResumeGuest(  # noqa: N802
        self, request: node_pb2.ResumeGuestRequest, context: grpc.ServicerContext
    ) -> node_pb2.ResumeGuestReply:
        """At the epoch that the guest has; refused while a migration decides about it."""
        for role in self._roles:
            if reason := role.why_not_resume():
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        with told(context):
            self._host.guest.link.resume(self._host.guest.hello().guest_epoch)
        return node_pb2.ResumeGuestReply()

    def CheckGuest(  # noqa: N802
        self, request: node_pb2.CheckGuestRequest, context: grpc.ServicerContext
    ) -> node_pb2.CheckGuestReply:
        """Every workload's self-check."""
        with told(context):
            checked, problems = self._host.guest.link.check(request.expectations)
        return node_pb2.CheckGuestReply(ok=not problems, problems=problems, checked_items=checked)

    def SetBalloon(  # noqa: N802
        self, request: node_pb2.SetBalloonRequest, context: grpc.ServicerContext
    ) -> node_pb2.SetBalloonReply:
        """The device's num_pages."""
        with told(context):
            self._host.balloon.set_num_pages(request.num_pages)
        return node_pb2.SetBalloonReply()

    def Stats(  # noqa: N802
        self, request: node_pb2.StatsRequest, context: grpc.ServicerContext
    ) -> node_pb2.StatsReply:
        """Fresh numbers of the guest's own kernel."""
        with told(context):
            wait_s = request.wait_ms / 1000 if request.wait_ms else STATS_S_MAX
            stats = self._host.balloon.guest_stats(wait_s)
        self._host.events.add("guest_stats", **stats.values)
        return node_pb2.StatsReply(values=stats.values, unknown_tags=stats.unknown_tags)

    def StandBy(  # noqa: N802
        self, request: node_pb2.StandByRequest, context: grpc.ServicerContext
    ) -> node_pb2.StandByReply:
        """Room for another guest. Idempotent."""
        with told(context):
            hello = self._host.guest.hello()
            if hello.state == "standby":
                return node_pb2.StandByReply()
            for role in self._roles:
                if reason := role.why_not_stand_by(hello):
                    context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
            self._host.guest.stand_by()
            self._host.balloon.disconnect()
        for role in self._roles:
            role.stood_by()
        self._host.events.add("standing_by", guest_epoch=hello.guest_epoch)
        return node_pb2.StandByReply()

    # -- migrations ----------------------------------------------------------------------------

    def Migrate(  # noqa: N802
        self, request: node_pb2.MigrateRequest, context: grpc.ServicerContext
    ) -> node_pb2.MigrateReply:
        """Begins; the outcome is the event migration_ended."""
        role = self._giver(context)
        with told(context):
            role.start_migration(request)
        return node_pb2.MigrateReply()

    def Cancel(  # noqa: N802
        self, request: node_pb2.CancelRequest, context: grpc.ServicerContext
    ) -> node_pb2.CancelReply:
        """Asks the running migration to stop."""
        role = self._giver(context)
        with told(context):
            effective, phase = role.cancel(request.reason)
        return node_pb2.CancelReply(effective=effective, phase=phase)

    def Resolve(  # noqa: N802
        self, request: node_pb2.ResolveRequest, context: grpc.ServicerContext
    ) -> node_pb2.ResolveReply:
        """An operator's word, which the role holds against its journal."""
        found = [role for role in self._roles if isinstance(role, Resolves) and role.name == request.role]
        with told(context):
            if not found or request.verdict not in VERDICTS:
                raise ValueError(f"no role {request.role!r} with a verdict {request.verdict!r} here")
            key = AttemptKey(request.migration, request.attempt, request.guest_epoch)
            verdict = Answer[request.verdict]
            state = found[0].resolve(key, verdict, request.image_digest, request.reason)
        self._host.events.add("resolved", attempt=str(key), verdict=request.verdict, reason=request.reason)
        return node_pb2.ResolveReply(state=state)

    def MeasureDirtyRate(  # noqa: N802
        self, request: node_pb2.DirtyRateRequest, context: grpc.ServicerContext
    ) -> node_pb2.DirtyRateReply:
        """Blocks for as long as it measures."""
        role = self._giver(context)
        with told(context):
            return role.measure_dirty_rate(request.period_ms, request.periods)

    def ArmPoint(  # noqa: N802
        self, request: node_pb2.ArmPointRequest, context: grpc.ServicerContext
    ) -> node_pb2.ArmPointReply:
        """Holds whoever reaches the point next."""
        with told(context):
            self._host.points.arm(request.point, request.hold_ms_max)
        return node_pb2.ArmPointReply()

    def ReleasePoint(  # noqa: N802
        self, request: node_pb2.ReleasePointRequest, context: grpc.ServicerContext
    ) -> node_pb2.ReleasePointReply:
        """Disarms it, and lets whoever waits there go on."""
        return node_pb2.ReleasePointReply(was_held=self._host.points.release(request.point))

    def Artifact(  # noqa: N802
        self, request: node_pb2.ArtifactRequest, context: grpc.ServicerContext
    ) -> Iterator[node_pb2.ArtifactPiece]:
        """The bytes of one file."""
        found = [path for role in self._roles if (path := role.artefact(request.name)) is not None]
        if not found:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no artefact {request.name!r} on {self._host.name}")
        with found[0].open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield node_pb2.ArtifactPiece(data=piece)

    def Shutdown(  # noqa: N802
        self, request: node_pb2.ShutdownRequest, context: grpc.ServicerContext
    ) -> node_pb2.ShutdownReply:
        """The main thread does the rest after this call was answered."""
        self._stop.set()
        return node_pb2.ShutdownReply()

    def _giver(self, context: grpc.ServicerContext) -> GivesGuestsAway:
        givers = [role for role in self._roles if isinstance(role, GivesGuestsAway)]
        if not givers:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self._host.name} has no source role")
        return givers[0]


@contextmanager
def told(context: grpc.ServicerContext) -> Iterator[None]:
    """Turns this package's errors into gRPC statuses with one line."""
    try:
        yield
    except ValueError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (RoleRefused, AgentError, DeviceNotReady) as error:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except AgentLost as error:
        context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
