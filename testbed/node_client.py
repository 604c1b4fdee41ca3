"""The testbed's side of node.proto: one node, spoken to with deadlines.

Rule 1: every call has a deadline; a refusal or a silence becomes one line that names node, call and reason.
Rule 2: events are watched on a thread from the node's start and go into the history as they come.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from host.tls import PLAIN, Trust
from migration.pb import node_pb2, node_pb2_grpc
from testbed.errors import RunBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from testbed.history import History, Origin

Reply = TypeVar("Reply")

MESSAGE_BYTES_MAX = 64 << 20  # self-check expectations: 16 bytes for each item that a guest remembers
# A node that starts binds its socket within milliseconds of the first look; gRPC would retry after a second.
CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_http_proxy", 0),
]
CALL_S = 30.0  # of calls that only look or flip a switch
LOOK_S = 0.2  # between two looks for a state


class NodeClient:
    """A node's Node service. Over TCP `trust` has the run's control certificate; `server_name` is the node's."""

    def __init__(
        self, origin: Origin, control: str, history: History, *, trust: Trust = PLAIN, server_name: str = ""
    ) -> None:
        self.origin = origin
        self._history = history
        self._channel = trust.channel(control, server_name, CHANNEL_OPTIONS)
        self._stub = node_pb2_grpc.NodeStub(self._channel)
        self._watch: Any = None  # a call that is also an iterator of NodeEvent; the stubs know no such type
        self._watcher: threading.Thread | None = None

    def wait_until_serving(self, timeout_s: float, still_worth_it: Callable[[], bool]) -> None:
        """Returns when the node says that it serves. Raises RunBrokenError when it does not in time."""
        health = health_pb2_grpc.HealthStub(self._channel)
        for _ in range(max(1, round(timeout_s / LOOK_S))):
            try:
                reply = health.Check(health_pb2.HealthCheckRequest(), timeout=LOOK_S, wait_for_ready=True)
                break
            except grpc.RpcError as error:
                # The channel of a node that is started again may not have noticed yet that the old one is gone.
                if _code(error) not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise RunBrokenError(f"Health at the {self.origin} node: {_line(error)}") from error
                if not still_worth_it():
                    raise RunBrokenError(f"the {self.origin} node ended while it started") from None
        else:
            raise RunBrokenError(f"the {self.origin} node did not serve within {timeout_s:.0f} s")
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            raise RunBrokenError(f"the {self.origin} node says that it does not serve")
        self._end_watch()  # of an earlier process of this node
        self._watch = self._stub.Watch(node_pb2.WatchRequest())
        self._watcher = threading.Thread(target=self._follow, name=f"events-{self.origin}", daemon=True)
        self._watcher.start()

    def describe(self) -> node_pb2.DescribeReply:
        """Versions, roles, addresses."""
        return self._call("Describe", lambda: self._stub.Describe(node_pb2.DescribeRequest(), timeout=CALL_S))

    def guest_status(self, timeout_s: float = CALL_S) -> node_pb2.GuestStatusReply:
        """The guest now."""
        request = node_pb2.GuestStatusRequest()
        return self._call("GuestStatus", lambda: self._stub.GuestStatus(request, timeout=timeout_s))

    def refresh_stats(self) -> None:
        """Have the guest's balloon driver asked for fresh memory statistics; they are in the next status."""
        self._call("Stats", lambda: self._stub.Stats(node_pb2.StatsRequest(), timeout=CALL_S))

    def pause_guest(self) -> None:
        """Stops the guest's threads."""
        self._call("PauseGuest", lambda: self._stub.PauseGuest(node_pb2.PauseGuestRequest(), timeout=CALL_S))

    def resume_guest(self) -> None:
        """Lets the paused guest run on."""
        self._call(
            "ResumeGuest", lambda: self._stub.ResumeGuest(node_pb2.ResumeGuestRequest(), timeout=CALL_S)
        )

    def stand_by(self, timeout_s: float) -> None:
        """Has a guest that was given away let go of, so that the host can take one in again."""
        self._call("StandBy", lambda: self._stub.StandBy(node_pb2.StandByRequest(), timeout=timeout_s))

    def check_guest(self, expectations: bytes, timeout_s: float) -> node_pb2.CheckGuestReply:
        """Has the guest check itself."""
        request = node_pb2.CheckGuestRequest(expectations=expectations)
        return self._call("CheckGuest", lambda: self._stub.CheckGuest(request, timeout=timeout_s))

    def set_balloon(self, num_pages: int) -> None:
        """Sets the balloon's target."""
        request = node_pb2.SetBalloonRequest(num_pages=num_pages)
        self._call("SetBalloon", lambda: self._stub.SetBalloon(request, timeout=CALL_S))

    def migrate(self, request: node_pb2.MigrateRequest) -> None:
        """Starts a migration."""
        self._call("Migrate", lambda: self._stub.Migrate(request, timeout=CALL_S))

    def measure_dirty_rate(self, period_ms: int, periods: int) -> node_pb2.DirtyRateReply:
        """Has the guest's writing measured; takes as long as the periods."""
        request = node_pb2.DirtyRateRequest(period_ms=period_ms, periods=periods)
        timeout_s = CALL_S + period_ms * periods / 1e3
        return self._call("MeasureDirtyRate", lambda: self._stub.MeasureDirtyRate(request, timeout=timeout_s))

    def cancel(self, reason: str) -> node_pb2.CancelReply:
        """Asks the running migration to stop."""
        request = node_pb2.CancelRequest(reason=reason)
        return self._call("Cancel", lambda: self._stub.Cancel(request, timeout=CALL_S))

    def resolve(self, request: node_pb2.ResolveRequest) -> str:
        """An operator's word about an attempt; the state that the node's journal has then."""
        return self._call("Resolve", lambda: self._stub.Resolve(request, timeout=CALL_S)).state

    def arm_point(self, point: str, hold_ms_max: int) -> None:
        """Holds the node when it reaches a point (host/points.py); the event is point_reached."""
        request = node_pb2.ArmPointRequest(point=point, hold_ms_max=hold_ms_max)
        self._call("ArmPoint", lambda: self._stub.ArmPoint(request, timeout=CALL_S))

    def release_point(self, point: str, timeout_s: float = CALL_S) -> bool:
        """Lets a node that waits at a point go on, and disarms the point; whether it was waiting."""
        request = node_pb2.ReleasePointRequest(point=point)
        reply = self._call("ReleasePoint", lambda: self._stub.ReleasePoint(request, timeout=timeout_s))
        return reply.was_held

    def shutdown(self) -> None:
        """Asks the node to end."""
        self._call("Shutdown", lambda: self._stub.Shutdown(node_pb2.ShutdownRequest(), timeout=CALL_S))

    def save_artefact(self, name: str, path: Path, timeout_s: float) -> None:
        """Stores an artefact of the node in a file. Raises RunBrokenError when the node has none."""

        def fetch() -> None:
            pieces = self._stub.Artifact(node_pb2.ArtifactRequest(name=name), timeout=timeout_s)
            beside = path.with_name(f".{path.name}")
            with beside.open("wb") as file:
                file.writelines(piece.data for piece in pieces)
            beside.replace(path)

        self._call(f"Artifact {name}", fetch)

    def close(self) -> None:
        """Ends the watch and the connection."""
        self._end_watch()
        self._channel.close()

    def wait_for_last_event(self, timeout_s: float) -> None:
        """Gives a node that ends the time to tell its last events."""
        if self._watcher is not None:
            self._watcher.join(timeout_s)

    def _end_watch(self) -> None:
        if self._watch is not None and self._watcher is not None:
            self._watch.cancel()
            self._watcher.join()  # ends: the call is cancelled

    def _follow(self) -> None:
        assert self._watch is not None
        try:
            for event in self._watch:
                self._history.record(self.origin, event.name, parse_fields(event.fields_json), event.at_ns)
        except grpc.RpcError as error:
            if _code(error) is not grpc.StatusCode.CANCELLED:  # ours, in close()
                self._history.note("watch_ended", host=self.origin, reason=_line(error))

    def _call(self, what: str, call: Callable[[], Reply]) -> Reply:
        try:
            return call()
        except grpc.RpcError as error:
            raise RunBrokenError(f"{what} at the {self.origin} node: {_line(error)}") from error


def parse_fields(fields_json: str) -> dict[str, Any]:
    """The fields of a node's event; what is not a JSON object is kept as text rather than lost."""
    try:
        fields = json.loads(fields_json or "{}")
    except ValueError:
        return {"malformed": fields_json}
    return fields if isinstance(fields, dict) else {"malformed": fields_json}


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    # Errors of calls are grpc.Call as well; the stubs do not say so.
    ask: Callable[[], grpc.StatusCode] | None = getattr(error, "code", None)
    return ask() if ask is not None else grpc.StatusCode.UNKNOWN


def _line(error: grpc.RpcError) -> str:
    ask: Callable[[], str | None] | None = getattr(error, "details", None)
    lines = ((ask() if ask is not None else str(error)) or "no reason given").splitlines()
    return f"{_code(error).name.lower().replace('_', ' ')}: {lines[0]}"
