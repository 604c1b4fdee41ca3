"""The sideband server: whatever a node sends costs at most its connection, and no descriptor stays behind."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guest_agent.control import ControlServer, Reply, Request
from guest_agent.errors import OperationRefused
from virtio.sideband import MESSAGE_BYTES_MAX, decode, encode


class Served:
    """A server on a thread whose operations answer, refuse, or keep the descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ending = False
        self.taken: list[int] = []
        self.server = ControlServer(path, self.handle)
        self.thread = threading.Thread(target=self.server.serve, args=(lambda: not self.ending,))
        self.thread.start()

    def handle(self, request: Request) -> Reply:
        if request.op == "freeze":
            raise OperationRefused("not now")
        if request.op == "check":
            self.taken.append(request.take_fd())
        if request.op == "frames":
            return Reply(owned_fds=[os.memfd_create("frames")])
        return Reply({"echo": request.op})

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(10)
        connection.connect(str(self.path))
        return connection

    def close(self) -> None:
        self.ending = True
        self.server.wake()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()
        for fd in self.taken:
            os.close(fd)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # hundreds of lines about garbage
    server = Served(tmp_path_factory.mktemp("control") / "agent")
    yield server
    server.close()
    structlog.reset_defaults()


def ask(connection: socket.socket, op: str, identity: int = 1) -> dict[str, object]:
    connection.send(encode(op, id=identity))
    return decode(connection.recv(MESSAGE_BYTES_MAX))[1]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_answer_has_the_id_of_its_request(served: Served) -> None:
    with served.connect() as node:
        assert ask(node, "hello", 77) == {"id": 77, "ok": True, "echo": "hello"}


def test_a_refusal_is_an_answer_and_keeps_the_connection(served: Served) -> None:
    with served.connect() as node:
        assert ask(node, "freeze") == {"id": 1, "ok": False, "error": "not now"}
        assert ask(node, "hello")["ok"]


def test_the_newest_connection_is_served(served: Served) -> None:
    with served.connect() as old, served.connect() as new:
        assert ask(new, "hello")["ok"]
        assert old.recv(10) == b""


def test_notifications_reach_the_node_that_is_served(served: Served) -> None:
    with served.connect() as node:
        assert ask(node, "hello")["ok"]
        served.server.notify("ready")
        assert decode(node.recv(MESSAGE_BYTES_MAX)) == ("notify", {"event": "ready"})


def test_the_socket_is_for_its_owner_only(served: Served) -> None:
    assert served.path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(
        st.binary(min_size=1, max_size=200),
        st.sampled_from(
            [b"[]", b'{"op":"hello"}', b'{"op":"hello","id":-1}', b'{"op":"notify","event":"ready"}']
        ),
        st.just(b'{"id":1,"ok":true}'),
        st.just(b"x" * (MESSAGE_BYTES_MAX + 1)),
    )
)
def test_garbage_costs_the_connection_only(served: Served, garbage: bytes) -> None:
    with served.connect() as node:
        node.send(garbage)
        assert node.recv(10) == b""
    with served.connect() as node:
        assert ask(node, "hello")["ok"]


def test_descriptors_are_taken_or_closed(served: Served) -> None:
    read_end, write_end = os.pipe()
    with served.connect() as node:
        assert ask(node, "hello")["ok"]
        before = open_fds()
        for _ in range(20):
            socket.send_fds(node, [encode("hello", id=1)], [read_end, write_end])
            assert decode(node.recv(MESSAGE_BYTES_MAX))[1]["ok"]
        assert ask(node, "hello")["ok"], (
            "the server closes after it answered; it has done so when it answers again"
        )
        assert open_fds() == before
        assert ask(node, "check")["ok"] is False, "a descriptor is needed and none came"
        socket.send_fds(node, [encode("check", id=1)], [read_end, write_end])
        assert decode(node.recv(MESSAGE_BYTES_MAX))[1]["ok"]
        assert ask(node, "hello")["ok"]
        assert open_fds() == before + 1, "one was taken, the other closed"
        socket.send_fds(node, [encode("frames", id=1)], [])
        _, (fd,), _, _ = socket.recv_fds(node, MESSAGE_BYTES_MAX, 4)
        os.close(fd)
        assert ask(node, "hello")["ok"]
        assert open_fds() == before + 1, "what was made for the reply is closed after it"
        socket.send_fds(node, [b"garbage"], [read_end])
        assert node.recv(10) == b""
    with served.connect() as node:
        assert ask(node, "hello")["ok"]
        assert open_fds() == before + 1, "a dropped connection takes its descriptors along"
    os.close(read_end)
    os.close(write_end)


def test_a_flood_of_descriptors_costs_the_connection(served: Served) -> None:
    before = open_fds()
    with served.connect() as node:
        socket.send_fds(node, [encode("hello", id=1)], [0] * 50)
        assert node.recv(10) == b""
    with served.connect() as node:
        assert ask(node, "hello")["ok"]
    assert open_fds() <= before + 1


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    server = ControlServer(path, lambda _: Reply())
    with pytest.raises(OSError, match="another agent"):
        ControlServer(path, lambda _: Reply())
    server.close()
    assert not path.exists()
