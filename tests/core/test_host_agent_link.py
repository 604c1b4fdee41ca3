"""The link to the guest agent: every request ends, every descriptor has one owner, garbage ends the link."""

from __future__ import annotations

import base64
import os
import socket
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from host.agent_link import AgentLink
from host.errors import AgentError, AgentLost
from virtio.sideband import FDS_MAX, MESSAGE_BYTES_MAX, NOTIFY, decode, encode, encode_error, encode_reply

HELLO = {
    "version": 1,
    "kind": "ballast",
    "state": "running",
    "guest_epoch": 3,
    "pages": 64,
    "free_pages": 5,
    "ballooned_pages": 0,
    "held_pages": 0,
    "balloon_ready": True,
    "operations": 9,
    "workloads": {"kv": {"operations": 9}},
    "pid": 4711,
    "ready": True,
}
DEVICE = {"features": 1 << 32, "num_pages": 0, "actual": 0, "poison_value": 0, "ring_bases": [0, 1, 2, 3, 4]}


def open_fds():
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


class Asked(NamedTuple):
    """A request as it arrived."""

    op: str
    fields: dict
    fds: list


class Agent:
    """The other end, in a thread: answers each request as `script` says."""

    def __init__(self, path, script):
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.script = script
        self.connection = None
        self.accepted = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        self.connection, _ = self.listener.accept()
        self.accepted.set()
        while True:
            data, fds, _, _ = socket.recv_fds(self.connection, MESSAGE_BYTES_MAX, FDS_MAX)
            if not data:
                return
            try:
                self.script(self.connection, Asked(*decode(data), fds))
            finally:
                for fd in fds:
                    os.close(fd)

    def close(self):
        self.thread.join()
        if self.connection is not None:
            self.connection.close()
        self.listener.close()


@pytest.fixture
def linked(tmp_path):
    """make(script, **link options) -> (link, agent); both end with the test and leave no descriptor."""
    before = open_fds()
    made = []

    def make(script, **options):
        path = tmp_path / "agent.sock"
        agent = Agent(path, script)
        link = AgentLink(path, **options)
        made.append((link, agent))
        link.connect(5)
        return link, agent

    yield make
    for link, agent in made:
        link.close()
        agent.close()
    assert open_fds() == before


def answer(connection, identity, fds=(), **fields):
    socket.send_fds(connection, [encode_reply(identity, **fields)], list(fds))


def agent_script(connection, asked):
    """A well-behaved agent."""
    own = []
    reply = {
        "hello": lambda: HELLO,
        "ram": lambda: {"base_address": 4096, "memory_bytes": 8192, "write_protect": ""},
        "pause": lambda: {"paused_at_ns": 5, "ring_bases": [1, 2, 3, 4, 5]},
        "save": lambda: {"state": base64.b64encode(b"registers").decode()},
        "restore": lambda: {"image_pages": os.fstat(asked.fds[0]).st_size, "digest_hex": "00000000000000ff"},
        "run": lambda: {"started_at_ns": 77},
        "check": lambda: {"ok_items": os.fstat(asked.fds[0]).st_size, "problems": ["one"]},
    }.get(asked.op, dict)()
    if asked.op in ("ram", "frames"):
        own = [os.memfd_create("answer") for _ in range(2 if asked.op == "ram" else 1)]
        os.pwrite(own[0], bytes([0, 1, 2, 3]), 0)
    answer(connection, asked.fields["id"], own, **reply)
    for fd in own:
        os.close(fd)


def test_every_operation_gives_what_it_says(linked):
    link, _ = linked(agent_script)
    hello = link.hello()
    assert (hello.state, hello.guest_epoch, hello.workloads) == ("running", 3, {"kv": {"operations": 9}})
    ram = link.ram()
    assert (ram.base_address, ram.memory_bytes, ram.write_protect_reason) == (4096, 8192, "")
    assert os.get_inheritable(ram.memfd) is False
    ram.close()
    assert link.pause().ring_bases == (1, 2, 3, 4, 5)
    assert link.save() == b"registers"
    memfd = os.memfd_create("ram")
    os.ftruncate(memfd, 4096)
    restored = link.restore(4, b"registers", DEVICE, memfd)
    os.close(memfd)
    assert (restored.image_pages, restored.state_digest) == (4096, 255)
    assert link.run(4) == 77
    frames = link.frames()
    assert frames.dtype == np.uint8
    assert frames.tolist() == [0, 1, 2, 3]
    assert link.check(b"x" * 100_000) == (100_000, ["one"])
    link.resume(4)
    link.throttle(30)
    link.discard()
    link.freeze()
    link.shutdown()


def test_a_refusal_names_the_operation_and_the_reason(linked):
    def refuse(connection, asked):
        connection.send(encode_error(asked.fields["id"], "no such epoch"))

    link, _ = linked(refuse)
    with pytest.raises(AgentError, match="refused 'resume': no such epoch") as caught:
        link.resume(9)
    assert (caught.value.operation, caught.value.reason) == ("resume", "no such epoch")
    assert link.connected


@pytest.mark.parametrize("count", [0, 3])
def test_descriptors_of_a_reply_that_has_too_few_or_too_many_are_closed(linked, count):
    def wrong(connection, asked):
        own = [os.memfd_create("answer") for _ in range(count)]
        answer(connection, asked.fields["id"], own, base_address=0, memory_bytes=4096, write_protect="")
        for fd in own:
            os.close(fd)

    link, _ = linked(wrong)
    with pytest.raises(AgentError, match=f"malformed reply: {count} descriptors"):
        link.ram()


def test_descriptors_of_a_malformed_reply_are_closed(linked):
    def wrong(connection, asked):
        own = os.memfd_create("answer")
        answer(
            connection, asked.fields["id"], [own], base_address="zero", memory_bytes=4096, write_protect=""
        )
        os.close(own)

    link, _ = linked(wrong)
    with pytest.raises(AgentError, match=r"malformed reply: .*'base_address'"):
        link.ram()


def test_a_reply_that_comes_too_late_is_dropped_with_its_descriptors(linked):
    late = []

    def silent(connection, asked):
        if asked.op == "frames":
            late.append(asked.fields["id"])
            return
        own = os.memfd_create("answer")
        answer(connection, late[0], [own])
        os.close(own)
        answer(connection, asked.fields["id"], **HELLO)

    link, _ = linked(silent)
    with pytest.raises(AgentLost, match="did not answer 'frames'"):
        link.request("frames", timeout=0.05)
    assert link.hello().pid == 4711  # the late reply came before this one and hurt nobody


def test_replies_out_of_order_reach_their_requests(linked):
    held = []

    def reversing(connection, asked):
        held.append(asked.fields)
        if len(held) == 2:
            for one in reversed(held):
                answer(connection, one["id"], started_at_ns=one["guest_epoch"])

    link, _ = linked(reversing)
    results = {}
    threads = [
        threading.Thread(target=lambda epoch=epoch: results.__setitem__(epoch, link.run(epoch)))
        for epoch in (5, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {5: 5, 6: 6}


@pytest.mark.parametrize("garbage", [b"\xff\xfe", b"{}", b'{"op":"hello","id":1}', b"[1]"])
def test_garbage_ends_the_link_and_all_requests(linked, garbage):
    lost = []
    told = threading.Event()

    def wild(connection, _):
        connection.send(garbage)

    link, _ = linked(wild, on_lost=lambda reason: (lost.append(reason), told.set()))
    with pytest.raises(AgentLost, match="garbage"):
        link.hello()
    assert told.wait(5)
    assert not link.connected
    assert len(lost) == 1
    with pytest.raises(AgentLost, match="no connection"):
        link.hello()


def test_an_agent_that_goes_away_ends_the_request_that_waits(linked):
    def leave(connection, _):
        connection.shutdown(socket.SHUT_RDWR)

    link, _ = linked(leave)
    with pytest.raises(AgentLost, match="closed the link"):
        link.save()


def test_closing_ends_the_request_that_waits(linked):
    asked = threading.Event()
    failures = []
    link, _ = linked(lambda *_: asked.set())

    def ask():
        with pytest.raises(AgentLost) as caught:
            link.save()
        failures.append(str(caught.value))

    waiting = threading.Thread(target=ask)
    waiting.start()
    assert asked.wait(5)
    link.close()
    waiting.join(5)
    assert failures == ["the link was closed"]
    with pytest.raises(AgentLost):
        link.connect(0)


def test_notifications_come_in_order(linked):
    heard = []
    enough = threading.Event()

    def on_notify(event, fields):
        heard.append((event, fields))
        if len(heard) == 2:
            enough.set()

    def tell(connection, asked):
        connection.send(encode(NOTIFY, event="ready"))
        connection.send(encode(NOTIFY, event="workload_failed", name="kv"))
        answer(connection, asked.fields["id"], **HELLO)

    link, _ = linked(tell, on_notify=on_notify)
    link.hello()
    assert enough.wait(5)
    assert heard == [("ready", {}), ("workload_failed", {"name": "kv"})]


def test_nobody_listening_is_lost_after_the_timeout(tmp_path):
    link = AgentLink(tmp_path / "nobody.sock")
    with pytest.raises(AgentLost, match="no guest agent at"):
        link.connect(0.05)
    link.close()


def test_it_waits_for_an_agent_that_starts_later(tmp_path):
    path = tmp_path / "agent.sock"
    link = AgentLink(path)
    connected = threading.Thread(target=link.connect, args=(10,))
    connected.start()
    agent = Agent(path, agent_script)
    connected.join(10)
    assert link.hello().ready
    link.close()
    agent.close()
