"""The balloon device over real sockets, eventfds and a memfd, against a driver that is right and one that lies."""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import select
import socket
import stat
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host.balloon_server import BalloonServer, DeviceState
from host.device_log import DeviceLog
from host.errors import DeviceNotReady, LoopEnded
from host.guest_memory import HostRam
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    BalloonConfig,
)
from virtio.balloon_device import FEATURES_DEFAULT
from virtio.errors import RemoteProtocolError
from virtio.testing import MockDriver
from virtio.vhost_user import (
    HEADER_BYTES,
    ConfigRead,
    FrontendSession,
    Message,
    Request,
    RingSetup,
    RingsStopped,
    decode,
    decode_header,
)

pytestmark = pytest.mark.live

PAGE_BYTES = 4096
BLOCK_PAGES = 1024  # 4 MiB: what Linux hints
PAGES = 64 * BLOCK_PAGES
WAIT_S = 20


def open_fds():
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


class Guest:
    """Guest RAM with a mock driver, and a front-end that connects it to a device."""

    def __init__(self, path, *, pages=PAGES, bases=None, fd=None, event_idx=False):
        self.fd = os.memfd_create("guest") if fd is None else fd
        os.ftruncate(self.fd, pages * PAGE_BYTES)
        self.mapping = mmap.mmap(self.fd, pages * PAGE_BYTES)
        self.memory = memoryview(self.mapping)
        self.driver = MockDriver(self.memory, event_idx=event_idx) if fd is None else None
        self.pages = pages
        self.config = None
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]
        self.channel, theirs = socket.socketpair()
        self.main = socket.socket(socket.AF_UNIX)
        self.main.settimeout(WAIT_S)
        self.channel.settimeout(WAIT_S)
        self.main.connect(str(path))
        wanted = FEATURES_DEFAULT if event_idx else FEATURES_DEFAULT & ~(1 << 29)
        self.session = FrontendSession(lambda offered: offered & wanted, theirs.fileno())
        self.exchange(self.session.start())
        theirs.close()
        if bases is not None or fd is None:
            self.start(bases or [0] * QUEUE_COUNT)

    def start(self, bases):
        self.exchange(self.session.set_memory(self.fd, self.pages * PAGE_BYTES, 0x7F00_0000_0000))
        setups = [
            RingSetup(index, self.driver.layouts[index], bases[index], self.kicks[index], self.calls[index])
            for index in (QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_HINT)
        ]
        self.exchange(self.session.start_rings(setups))

    def exchange(self, actions):
        """Carry actions out until nothing is left to send; returns the events."""
        events = []
        todo = list(actions)
        while todo or not self.session.idle:
            if not todo:
                todo = self.session.feed(self.receive())
                continue
            action = todo.pop(0)
            if isinstance(action, Message):
                socket.send_fds(self.main, [action.to_bytes()], list(action.fds))
            else:
                events.append(action)
                if isinstance(action, ConfigRead):
                    self.config = BalloonConfig.from_bytes(action.config)
        return events

    def receive(self):
        data = receive_exactly(self.main, HEADER_BYTES)
        return decode(data + receive_exactly(self.main, decode_header(data)[2]))

    def stop(self):
        """GET_VRING_BASE of the three rings; their bases."""
        (stopped,) = [
            event
            for event in self.exchange(self.session.stop([QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_HINT]))
            if isinstance(event, RingsStopped)
        ]
        return stopped.bases

    def read_config(self):
        self.exchange(self.session.read_config())
        return self.config

    def hear(self):
        """Wait for a CONFIG_CHANGE_MSG and read the configuration."""
        data = receive_exactly(self.channel, HEADER_BYTES)
        self.exchange(self.session.feed_backend(decode(data)))
        return self.config

    def kick(self, index):
        os.eventfd_write(self.kicks[index], 1)

    def wait_used(self, index, count):
        """Wait for interrupts until `count` chains came back."""
        came = self.driver.used(index)
        while len(came) < count:
            assert select.select([self.calls[index]], [], [], WAIT_S)[0], f"{len(came)} of {count} came back"
            os.eventfd_read(self.calls[index])
            came += self.driver.used(index)
        return came

    def close(self):
        for fd in (*self.kicks, *self.calls, self.fd):
            os.close(fd)
        self.main.close()
        self.channel.close()
        self.driver = self.memory = self.mapping = None  # a mapping holds a descriptor of its own


def receive_exactly(connection, size):
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


class Host:
    """A device whose hint batches are collected."""

    def __init__(self, path):
        self.path = path
        self.batches = queue.Queue()
        self.log = DeviceLog()
        self.server = BalloonServer(path, sink=self.batches.put, log=self.log)
        self.server.start()

    def batches_until_stop(self):
        got = []
        while not got or not got[-1].stopped:
            got.append(self.batches.get(timeout=WAIT_S))
        return got


@pytest.fixture
def host(tmp_path):
    before = open_fds()
    made = Host(tmp_path / "vhost.sock")
    yield made
    made.server.stop()
    assert not made.path.exists()
    assert open_fds() == before


@pytest.fixture
def guest(host):
    made = Guest(host.path)
    yield made
    made.close()


def blocks(first, count):
    return (np.arange(first, first + count, dtype=np.uint64) * BLOCK_PAGES * PAGE_BYTES).tolist()


def used_ring_pages(guest, index):
    layout = guest.driver.layouts[index]
    return set(range(layout.used // PAGE_BYTES, (layout.used + 6 + 8 * layout.size - 1) // PAGE_BYTES + 1))


def wait_for(condition):
    """Ask the device's own thread again and again: each question is a turn of its loop."""
    for _ in range(20_000):
        if condition():
            return
    raise AssertionError("it never happened")


# --- set-up ---------------------------------------------------------------------------------------


def test_the_handshake_makes_the_device_ready(host, guest):
    status = host.server.status()
    assert status.ready
    assert status.hints_negotiated
    assert status.features == guest.session.features
    assert guest.config.free_page_hint_cmd_id == CMD_ID_STOP
    assert stat.S_IMODE(host.path.stat().st_mode) == 0o600
    assert status.guest_errors == status.connection_errors == {}


def test_a_device_without_a_driver_is_not_ready(host):
    assert not host.server.status().ready
    for ask in (host.server.open_hints, lambda: host.server.set_num_pages(1)):
        with pytest.raises(DeviceNotReady):
            ask()
    host.server.hints_done()  # of a node that restarted: whoever connects next reads DONE
    batch = host.server.close_hints()
    assert (len(batch.pfn_first), batch.stopped) == (0, False)
    guest = Guest(host.path)
    assert guest.config.free_page_hint_cmd_id == CMD_ID_DONE
    guest.close()


def test_two_devices_cannot_share_a_socket(host):
    with pytest.raises(OSError, match="is another device there"):
        BalloonServer(host.path, sink=host.batches.put, log=host.log).start()


def test_a_socket_left_behind_is_replaced(tmp_path):
    path = tmp_path / "vhost.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    host = Host(path)
    guest = Guest(path)
    guest.close()
    host.server.stop()
    host.server.stop()
    with pytest.raises(LoopEnded):
        host.server.status()


# --- inflate and deflate --------------------------------------------------------------------------


def test_the_balloon_target_reaches_the_guest_and_its_size_comes_back(host, guest):
    host.server.set_num_pages(500)
    assert guest.hear().num_pages == 500
    guest.exchange(guest.session.write_config(4, struct.pack("<I", 300)))
    assert host.server.status().actual == 300
    with pytest.raises(ValueError, match="in a guest of"):
        host.server.set_num_pages(PAGES + 1)


def test_inflated_pages_are_punched_and_logged(host, guest):
    first = 40 * BLOCK_PAGES
    guest.memory[first * PAGE_BYTES : (first + 600) * PAGE_BYTES] = b"\xaa" * (600 * PAGE_BYTES)
    host.log.take()
    pfns = [first + 1, *range(first + 100, first + 200), first + 1]
    guest.driver.inflate(pfns)
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)
    ram = HostRam(os.dup(guest.fd), PAGES * PAGE_BYTES)
    holes = np.flatnonzero(~ram.populated()[first : first + 600]) + first
    ram.close()
    assert holes.tolist() == sorted(set(pfns))
    wait_for(lambda: host.server.status().inflated_pages == 101)
    logged = set(host.log.take().tolist())
    assert set(pfns) <= logged
    assert logged - set(pfns) <= used_ring_pages(guest, QUEUE_INFLATE)
    assert logged & used_ring_pages(guest, QUEUE_INFLATE)
    guest.driver.deflate(pfns[:50])
    guest.kick(QUEUE_DEFLATE)
    guest.wait_used(QUEUE_DEFLATE, 1)
    assert host.server.status().deflated_pages == 50


def test_pages_outside_ram_are_counted_and_never_touched(host, guest):
    guest.driver.inflate([PAGES, 2**32 - 1, 50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)
    status = host.server.status()
    assert status.guest_errors == {"pfn_range": 2}
    assert status.inflated_pages == 1
    assert os.fstat(guest.fd).st_size == PAGES * PAGE_BYTES


# --- hints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_whole_report(host, event_idx):
    guest = Guest(host.path, event_idx=event_idx)
    command_id = host.server.open_hints()
    assert command_id == CMD_ID_FIRST
    assert guest.hear().free_page_hint_cmd_id == command_id
    assert guest.driver.report(command_id, blocks(10, 50), BLOCK_PAGES * PAGE_BYTES) == 50
    guest.kick(QUEUE_HINT)
    batches = host.batches_until_stop()
    assert batches[0].started
    assert {batch.command_id for batch in batches} == {command_id}
    assert np.concatenate([batch.pfn_first for batch in batches]).tolist() == [
        block * BLOCK_PAGES for block in range(10, 60)
    ]
    assert all((batch.page_count == BLOCK_PAGES).all() for batch in batches)
    assert batches[0].pfn_first.dtype == batches[0].page_count.dtype == np.uint64
    guest.wait_used(QUEUE_HINT, 52)
    last = host.server.close_hints()
    assert (len(last.pfn_first), last.stopped) == (0, False)
    assert guest.hear().free_page_hint_cmd_id == CMD_ID_STOP
    host.server.hints_done()
    assert guest.hear().free_page_hint_cmd_id == CMD_ID_DONE
    assert host.server.open_hints() == command_id + 1
    guest.close()


def test_hazard_2_closing_drains_the_queue_first(host, guest):
    """What the guest had put into the ring before the close is in the close's batch, kicked or not."""
    command_id = host.server.open_hints()
    guest.driver.report(command_id, blocks(10, 20), BLOCK_PAGES * PAGE_BYTES)
    last = host.server.close_hints()
    assert last.command_id == command_id
    assert (last.started, last.stopped, len(last.pfn_first)) == (True, True, 20)
    assert host.batches.empty()


def test_hazard_3_what_comes_after_the_close_is_stale(host, guest):
    command_id = host.server.open_hints()
    guest.driver.command(command_id)
    guest.kick(QUEUE_HINT)
    assert host.batches.get(timeout=WAIT_S).started
    assert not host.server.close_hints().stopped
    guest.driver.hint(blocks(10, 3), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    late = host.batches.get(timeout=WAIT_S)
    assert (len(late.pfn_first), late.stale_pages) == (0, 3 * BLOCK_PAGES)
    guest.driver.command(CMD_ID_STOP)
    new_id = host.server.open_hints()
    assert new_id != command_id
    guest.driver.hint(blocks(20, 1), BLOCK_PAGES * PAGE_BYTES)
    guest.driver.report(new_id, blocks(30, 2), BLOCK_PAGES * PAGE_BYTES)
    last = host.server.close_hints()
    assert last.stale_pages == BLOCK_PAGES
    assert last.pfn_first.tolist() == [30 * BLOCK_PAGES, 31 * BLOCK_PAGES]


def test_hazard_4_a_guest_that_floods_does_not_hold_the_device_up(host, guest):
    command_id = host.server.open_hints()
    done = threading.Event()

    def flood():
        guest.driver.command(command_id)
        while not done.is_set():
            guest.driver.hint(blocks(10, 40), BLOCK_PAGES * PAGE_BYTES)
            guest.kick(QUEUE_HINT)
            guest.driver.used(QUEUE_HINT)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        assert host.batches.get(timeout=WAIT_S).command_id == command_id
        for _ in range(50):
            assert host.server.status().ready
        host.server.close_hints()
        host.server.hints_done()
    finally:
        done.set()
        flooding.join()


def test_hazard_8_partial_and_overlapping_ranges(host, guest):
    command_id = host.server.open_hints()
    guest.driver.command(command_id)
    base = 50 * BLOCK_PAGES * PAGE_BYTES
    for address, length in ((base + 1, 3 * PAGE_BYTES), (base, 2 * PAGE_BYTES), (base + 5, 100)):
        guest.driver.hint([address], length)
    last = host.server.close_hints()
    assert list(zip(last.pfn_first.tolist(), last.page_count.tolist(), strict=True)) == [
        (base // PAGE_BYTES + 1, 2),
        (base // PAGE_BYTES, 2),
    ]
    assert last.rejected_ranges == 1


@pytest.mark.parametrize(
    ("lie", "kind", "survives"),
    [
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 0, 8, flags=1, following=0), "chain_loop", True),
        (
            lambda d: d.lie_descriptor(QUEUE_HINT, 0, PAGES * PAGE_BYTES - 4, 8, flags=2),
            "address_range",
            True,
        ),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 2**64 - 4096, 8192, flags=2), "address_range", True),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 4096, 0, flags=2), "length_zero", True),
        (lambda d: d.lie_descriptor(QUEUE_HINT, 0, 4096, 15, flags=4), "indirect_size", True),
        (lambda d: d.lie_available_index(QUEUE_HINT, 1000), "avail_index", False),
    ],
)
def test_hazard_9_lies_are_counted_and_cost_the_chain_or_the_ring(host, guest, lie, kind, survives):
    lie(guest.driver)
    if survives:
        guest.driver.lie_available(QUEUE_HINT, 0)
    guest.kick(QUEUE_HINT)
    wait_for(lambda: host.server.status().guest_errors == {kind: 1})
    assert host.server.status().ready
    assert bool(guest.driver.used_entries(QUEUE_HINT)) is survives
    guest.kick(QUEUE_HINT)  # a broken ring is not looked at again
    guest.driver.inflate([50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    guest.wait_used(QUEUE_INFLATE, 1)  # the other rings are as they were
    assert host.server.status().guest_errors == {kind: 1}


# --- stopping and moving on -----------------------------------------------------------------------


def test_after_the_rings_are_stopped_every_store_is_logged_and_none_follows(host, guest):
    command_id = host.server.open_hints()
    guest.driver.report(command_id, blocks(10, 20), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    host.batches_until_stop()
    bases = guest.stop()
    host.server.rings_stopped(timeout=0)
    assert bases == {QUEUE_INFLATE: 0, QUEUE_DEFLATE: 0, QUEUE_HINT: 22}
    assert set(host.log.take().tolist()) & used_ring_pages(guest, QUEUE_HINT)
    guest.driver.inflate([50 * BLOCK_PAGES])
    guest.kick(QUEUE_INFLATE)
    assert not host.server.status().ready
    assert host.log.take().tolist() == []
    assert host.server.device_state().ring_bases == (0, 0, 0, 22, 0)
    with pytest.raises(DeviceNotReady):
        host.server.open_hints()
    host.server.hints_done()  # also for a guest that stands still
    guest.start([bases.get(index, 0) for index in range(QUEUE_COUNT)])
    guest.wait_used(QUEUE_INFLATE, 1)  # what waited in the ring is served without a kick
    with pytest.raises(DeviceNotReady, match="still run"):
        host.server.rings_stopped(timeout=0)


def test_another_host_takes_the_device_over(host, guest, tmp_path):
    command_id = host.server.open_hints()
    guest.driver.report(command_id, blocks(10, 5), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    host.batches_until_stop()
    host.server.close_hints()
    host.server.set_num_pages(77)
    guest.exchange(guest.session.write_config(4, struct.pack("<I", 70)))
    bases = guest.stop()
    state = host.server.device_state()
    assert state == DeviceState(
        features=guest.session.features,
        num_pages=77,
        actual=70,
        poison_value=0,
        next_command_id=command_id + 1,
        hints_open=True,
        ring_bases=(0, 0, 0, 7, 0),
    )
    other = Host(tmp_path / "other.sock")
    other.server.adopt_state(state)
    assert other.server.device_state() == state.__class__(
        **{name: getattr(state, name) for name in state.__slots__ if name != "ring_bases"},
        ring_bases=(0,) * 5,
    )
    moved = Guest(other.path, fd=os.dup(guest.fd))
    assert (moved.config.num_pages, moved.config.actual) == (77, 70)
    assert moved.config.free_page_hint_cmd_id == CMD_ID_STOP
    moved.driver = guest.driver
    moved.start([bases.get(index, 0) for index in range(QUEUE_COUNT)])
    other.server.hints_done()
    assert moved.hear().free_page_hint_cmd_id == CMD_ID_DONE
    assert not other.server.device_state().hints_open
    with pytest.raises(DeviceNotReady, match="a guest is connected"):
        other.server.adopt_state(state)
    assert other.server.open_hints() == command_id + 1
    assert moved.driver.report(command_id + 1, blocks(20, 5), BLOCK_PAGES * PAGE_BYTES) == 5
    assert len(other.server.close_hints().pfn_first) == 5
    moved.close()
    other.server.stop()


def test_a_state_that_cannot_be_is_refused(host):
    state = DeviceState(1 << 63, 0, 0, 0, CMD_ID_FIRST, False, (0,) * 5)
    with pytest.raises(RemoteProtocolError, match="not offered"):
        host.server.adopt_state(state)


def test_hazard_5_a_front_end_that_comes_back_finds_the_device_as_it_was(host, guest):
    host.server.open_hints()
    host.server.set_num_pages(9)
    guest.main.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: not host.server.status().ready)
    host.server.rings_stopped(timeout=0)
    host.server.hints_done()
    again = Guest(host.path, fd=os.dup(guest.fd))
    assert (again.config.num_pages, again.config.free_page_hint_cmd_id) == (9, CMD_ID_DONE)
    again.driver = guest.driver
    again.start([0] * QUEUE_COUNT)
    assert host.server.status().ready
    again.close()


def test_the_newest_front_end_is_served(host, guest):
    newer = Guest(host.path)
    with pytest.raises((EOFError, OSError)):
        guest.read_config()
    assert newer.read_config().num_pages == 0
    newer.close()


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
