"""A host's balloon device over real sockets, eventfds and a memfd, and a guest that can be right and can lie."""

import gc
import mmap
import os
import queue
import select
import socket
from pathlib import Path

import numpy as np

from host.balloon_server import BalloonServer
from host.device_log import DeviceLog
from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_MUST_TELL_HOST,
    F_REPORTING,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_STATS_VQ,
    F_VERSION_1,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    BalloonConfig,
    has,
    mask,
)
from virtio.testing import MockDriver
from virtio.vhost_user import (
    HEADER_BYTES,
    ConfigRead,
    FrontendSession,
    Message,
    RingSetup,
    RingsStopped,
    decode,
    decode_header,
)

PAGE_BYTES = 4096
BLOCK_PAGES = 1024  # 4 MiB: what Linux hints
PAGES = 64 * BLOCK_PAGES
WAIT_S = 20
FEATURES = mask(F_MUST_TELL_HOST, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_RING_INDIRECT_DESC)


def open_fds():
    return {int(path.name) for path in Path("/proc/self/fd").iterdir()}


class Guest:
    """Guest RAM with a mock driver, and a front-end that connects it to a device.

    It accepts `features` (and VERSION_1) and sets up the rings of those queues; `packed` numbers them as Linux.
    `fd` is the RAM of a guest that was elsewhere before: its rings start when `start` is called.
    """

    def __init__(
        self,
        path,
        *,
        pages=PAGES,
        bases=None,
        fd=None,
        features=FEATURES,
        packed=False,
        ring_size=256,
        sealable=True,
    ):
        flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
        self.fd = os.memfd_create("guest", flags) if fd is None else fd
        os.ftruncate(self.fd, pages * PAGE_BYTES)
        self.mapping = mmap.mmap(self.fd, pages * PAGE_BYTES)
        self.memory = memoryview(self.mapping)
        event_idx = has(features, F_RING_EVENT_IDX)
        self.driver = (
            MockDriver(self.memory, event_idx=event_idx, ring_size=ring_size) if fd is None else None
        )
        optional = {QUEUE_STATS: F_STATS_VQ, QUEUE_HINT: F_FREE_PAGE_HINT, QUEUE_REPORTING: F_REPORTING}
        self.queues = [QUEUE_INFLATE, QUEUE_DEFLATE]
        self.queues += [queue for queue, feature in optional.items() if has(features, feature)]
        self.ring_of = {queue: index if packed else queue for index, queue in enumerate(self.queues)}
        self.pages = pages
        self.config = None
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(QUEUE_COUNT)]
        self.channel, theirs = socket.socketpair()
        self.main = socket.socket(socket.AF_UNIX)
        self.main.settimeout(WAIT_S)
        self.channel.settimeout(WAIT_S)
        self.main.connect(str(path))
        wanted = features | mask(F_VERSION_1)
        self.session = FrontendSession(lambda offered: offered & wanted, theirs.fileno())
        self.exchange(self.session.start())
        theirs.close()
        if bases is not None or fd is None:
            self.start(bases or [0] * QUEUE_COUNT)

    def start(self, bases):
        self.exchange(self.session.set_memory(self.fd, self.pages * PAGE_BYTES, 0x7F00_0000_0000))
        setups = [
            RingSetup(
                self.ring_of[queue],
                self.driver.layouts[queue],
                bases[queue],
                self.kicks[queue],
                self.calls[queue],
            )
            for queue in self.queues
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
        """GET_VRING_BASE of every ring; their bases, by queue."""
        (stopped,) = [
            event
            for event in self.exchange(self.session.stop(list(self.ring_of.values())))
            if isinstance(event, RingsStopped)
        ]
        return {queue: stopped.bases[ring] for queue, ring in self.ring_of.items()}

    def read_config(self):
        self.exchange(self.session.read_config())
        return self.config

    def hear(self):
        """Wait for a CONFIG_CHANGE_MSG and read the configuration."""
        data = receive_exactly(self.channel, HEADER_BYTES)
        self.exchange(self.session.feed_backend(decode(data)))
        return self.config

    def blocks(self):
        """512-byte blocks of storage that guest RAM takes of the host."""
        return os.fstat(self.fd).st_blocks

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

    def __init__(self, path, state_path=None):
        self.path = path
        self.batches = queue.Queue()
        self.log = DeviceLog()
        self.server = BalloonServer(path, sink=self.batches.put, log=self.log, state_path=state_path)
        self.server.start()

    @property
    def errors(self):
        """What the guest did wrong so far."""
        return self.server.status().guest_errors

    def batches_until_stop(self):
        got = []
        while not got or not got[-1].stopped:
            got.append(self.batches.get(timeout=WAIT_S))
        return got


def fixture_host(tmp_path):
    gc.collect()  # what an earlier test left would otherwise close in the middle of this one
    before = open_fds()
    made = Host(tmp_path / "vhost.sock")
    yield made
    made.server.stop()
    assert not made.path.exists()
    gc.collect()  # a mapping holds a descriptor of its own
    assert open_fds() == before


def fixture_guest(host):
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
