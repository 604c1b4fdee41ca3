"""Front-ends that break the rules of vhost-user, or do not listen: what it costs them, and nobody else."""

import contextlib
import os
import resource
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.live.balloon_peers import (
    BLOCK_PAGES,
    PAGE_BYTES,
    WAIT_S,
    Guest,
    fixture_guest,
    fixture_host,
    open_fds,
    receive_exactly,
    wait_for,
)
from virtio.balloon import QUEUE_INFLATE
from virtio.balloon_device import FEATURES_DEFAULT
from virtio.vhost_user import HEADER_BYTES, Message, Request, decode

pytestmark = pytest.mark.live
host = pytest.fixture(fixture_host)
guest = pytest.fixture(fixture_guest)


# --- garbage --------------------------------------------------------------------------------------


def garbage_messages():
    memfd = os.memfd_create("short")
    yield b"\0" * HEADER_BYTES, [], "version"
    yield struct.pack("<III", 1, 1, 2**31), [], "payload_size"
    yield Message(99).to_bytes(), [], "unknown_request"
    yield Message(Request.SET_VRING_NUM, payload=struct.pack("<II", 77, 4)).to_bytes(), [], "ring_index"
    table = struct.pack("<II", 1, 0) + struct.pack("<QQQQ", 0, 1 << 30, 0, 0)
    yield Message(Request.SET_MEM_TABLE, payload=table).to_bytes(), [memfd], "region"
    yield Message(Request.GET_FEATURES).to_bytes(), [memfd] * 9, "fds"
    yield Message(Request.SET_BACKEND_REQ_FD).to_bytes(), [memfd], "backend_fd"
    os.close(memfd)


def test_garbage_costs_the_connection_and_is_counted(host):
    expected = {}
    for data, fds, kind in garbage_messages():
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as wild:
            wild.settimeout(WAIT_S)
            wild.connect(str(host.path))
            socket.send_fds(wild, [data], fds)
            while wild.recv(4096):
                pass
        expected[kind] = expected.get(kind, 0) + 1
        assert host.server.status().connection_errors == expected
    guest = Guest(host.path)
    assert host.server.status().ready
    guest.close()


NUMBERS = st.one_of(st.integers(0, 6), st.sampled_from([256, 4096, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
PLAUSIBLE = st.builds(
    lambda request, flags, layout, numbers, cut, fds: (
        Message(
            request,
            flags,
            struct.pack(
                layout, *(n % 2**32 if c == "I" else n for c, n in zip(layout[1:], numbers, strict=False))
            ),
        ).to_bytes()[: -cut or None],
        fds,
    ),
    st.one_of(st.sampled_from(list(Request)), st.integers(0, 45)),
    st.sampled_from([1, 1, 1, 9, 5]),
    st.sampled_from(["<", "<Q", "<II", "<IIQQQQ", "<IIQQQQ", "<III", "<IIII"]),
    st.lists(NUMBERS, min_size=6, max_size=6),
    st.sampled_from([0] * 9 + [1]),
    st.lists(st.sampled_from(["memory", "eventfd", "socket"]), max_size=2),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(PLAUSIBLE, max_size=12))
def test_no_sequence_of_messages_ends_the_device(host, messages):
    """Whatever comes: at worst the connection is dropped; the device answers, and no descriptor is left."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    fds = {
        "memory": os.memfd_create("ram"),
        "eventfd": os.eventfd(0, os.EFD_NONBLOCK),
        "socket": theirs.fileno(),
    }
    os.ftruncate(fds["memory"], 16 * PAGE_BYTES)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as wild:
        wild.connect(str(host.path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for data, names in messages:
                socket.send_fds(wild, [data], [fds[name] for name in names])
        host.server.status()
    for closing in (ours, theirs):
        closing.close()
    os.close(fds["memory"])
    os.close(fds["eventfd"])
    wait_for(lambda: host.server.status() and open_fds() == before)


def test_a_message_in_single_bytes_is_a_message(host):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as slow:
        slow.settimeout(WAIT_S)
        slow.connect(str(host.path))
        for byte in Message(Request.GET_FEATURES).to_bytes():
            slow.send(bytes([byte]))
        reply = decode(receive_exactly(slow, HEADER_BYTES + 8))
    assert reply.flags == 5
    assert struct.unpack("<Q", reply.payload)[0] & FEATURES_DEFAULT == FEATURES_DEFAULT


def test_a_front_end_that_reads_no_answers_is_not_read_from_and_holds_nobody_up(host):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as deaf:
        deaf.connect(str(host.path))
        deaf.setblocking(False)
        question = Message(Request.GET_FEATURES).to_bytes() * 100
        with contextlib.suppress(BlockingIOError):
            for _ in range(100_000):
                deaf.send(question)
            pytest.fail("everything was read")
        assert not host.server.status().ready
    guest = Guest(host.path)
    assert host.server.status().ready
    guest.close()


def test_a_guest_that_never_takes_its_interrupts_holds_nobody_up(host, guest):
    os.eventfd_write(guest.calls[QUEUE_INFLATE], 2**64 - 2)  # the next write would block
    guest.driver.inflate([50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    wait_for(lambda: host.server.status().inflated_pages == 1)


def test_a_front_end_that_comes_while_the_device_stops_is_not_served_and_ends_nothing(host):
    """`stop` was called and its turn has not come: the loop looks at the listener first."""
    listener = host.server._listener
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(str(host.path))

        def stopping():
            host.server._listener = None
            host.server._accept()
            host.server._listener = listener

        host.server._loop.call(stopping)
    assert host.server.status().connection_errors == {}


def test_a_device_without_descriptors_turns_front_ends_away_and_serves_the_next(host):
    """Whoever waits would wake the loop for ever otherwise."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    wild = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_fds()) + 1, limits[1]))
    filling = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.eventfd(0))
        for connection in wild:
            connection.connect(str(host.path))
            connection.settimeout(WAIT_S)
            assert connection.recv(1) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in filling:
            os.close(fd)
        for connection in wild:
            connection.close()
    assert host.server.status().connection_errors == {"no_descriptors": 3}
    guest = Guest(host.path)
    assert host.server.status().ready
    guest.close()
