"""A node process by itself: what it serves, whom it lets in, and how it ends."""

import json
import signal
import stat
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from host.journal import Journal
from migration.pb import node_pb2, node_pb2_grpc

DEADLINE_S = 20.0


class Node:
    """One `python -m host`, with everything it needs in one directory."""

    def __init__(self, home, *roles):
        self.home = home
        self.control = f"unix:{home}/control.sock"
        roles = [part for role in roles for part in ("--role", role)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "host", "--name", "a", *roles, "--run-dir", home,
             "--vhost-socket", home / "v.sock", "--agent-socket", home / "g.sock",
             "--journal", home / "journal.sqlite", "--control", self.control],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def serving(self):
        """The channel to it, once it serves."""
        channel = grpc.insecure_channel(self.control, options=[("grpc.max_reconnect_backoff_ms", 200)])
        grpc.channel_ready_future(channel).result(timeout=DEADLINE_S)
        return channel

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, errors


@pytest.fixture
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("n")


@pytest.fixture
def node(home):
    started = Node(home, "source", "dest")
    yield started
    if started.process.poll() is None:
        started.end()
    started.process.stderr.close()


def test_health_and_reflection_are_served_on_the_control_port(node):
    with node.serving() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "ballast.v1.Node"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"ballast.v1.Node", "ballast.v1.Migration", "grpc.health.v1.Health"} <= set(names)


def test_sockets_are_for_their_owner_alone(node):
    with node.serving():
        for name in ("control.sock", "v.sock"):
            assert stat.S_IMODE((node.home / name).stat().st_mode) == 0o600


def test_it_describes_itself_before_there_is_a_guest(node):
    with node.serving() as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        described = stub.Describe(node_pb2.DescribeRequest(), timeout=5)
        assert list(described.roles) == ["source", "dest"]
        assert described.pid == node.process.pid
        assert json.loads(described.facts_json)["tracker"]["hash"] == ""
        assert stub.GuestStatus(node_pb2.GuestStatusRequest(), timeout=5).state == "absent"


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        (
            lambda stub: stub.Migrate(node_pb2.MigrateRequest(skip="none"), timeout=5),
            grpc.StatusCode.FAILED_PRECONDITION,
            "no running guest",
        ),
        (
            lambda stub: stub.Cancel(node_pb2.CancelRequest(), timeout=5),
            grpc.StatusCode.FAILED_PRECONDITION,
            "no migration",
        ),
        (
            lambda stub: list(stub.Artifact(node_pb2.ArtifactRequest(name="../node.json"), timeout=5)),
            grpc.StatusCode.NOT_FOUND,
            "no artefact",
        ),
        (
            lambda stub: stub.SetBalloon(node_pb2.SetBalloonRequest(num_pages=1), timeout=5),
            grpc.StatusCode.FAILED_PRECONDITION,
            "balloon",
        ),
    ],
    ids=["migrate", "cancel", "artefact", "balloon"],
)
def test_what_is_not_possible_is_refused_in_one_line(node, call, status, words):
    with node.serving() as channel:
        with pytest.raises(grpc.RpcError) as caught:
            call(node_pb2_grpc.NodeStub(channel))
        assert caught.value.code() is status
        assert words in caught.value.details()
        assert "\n" not in caught.value.details()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_and_takes_its_sockets_along(node, number):
    node.serving().close()
    code, errors = node.end(number)
    assert code == 0, errors
    assert "Traceback" not in errors
    assert not (node.home / "v.sock").exists()


def test_shutdown_ends_every_watch_with_the_last_event(node):
    with node.serving() as channel:
        stub = node_pb2_grpc.NodeStub(channel)
        watch = stub.Watch(node_pb2.WatchRequest(), timeout=DEADLINE_S)
        assert next(watch).name == "node_started"
        stub.Shutdown(node_pb2.ShutdownRequest(), timeout=5)
        names = [event.name for event in watch]
        assert names[-1] == "node_stopping"
        assert "node_resources" in names
    assert node.process.wait(DEADLINE_S) == 0


def test_an_unknown_role_is_a_usage_error(home):
    node = Node(home, "source", "spectator")
    _, errors = node.process.communicate(timeout=DEADLINE_S)
    assert node.process.returncode == 3
    assert "no role 'spectator'; known roles: dest, source" in errors
    assert "Traceback" not in errors


def test_two_processes_never_share_a_journal(home):
    with Journal(home / "journal.sqlite"):
        node = Node(home, "source")
        _, errors = node.process.communicate(timeout=DEADLINE_S)
    assert node.process.returncode == 1
    assert "is held by process" in errors
    assert "Traceback" not in errors
