"""The balloon device's rings stop, its guest moves, its front-end and its node come back."""

import os
import socket
import struct

import pytest

from host.balloon_server import DeviceState
from host.errors import DeviceNotReady
from tests.live.balloon_peers import (
    BLOCK_PAGES,
    PAGE_BYTES,
    Guest,
    Host,
    blocks,
    fixture_guest,
    fixture_host,
    used_ring_pages,
    wait_for,
)
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    QUEUE_COUNT,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
)
from virtio.errors import RemoteVirtioError

pytestmark = pytest.mark.live
host = pytest.fixture(fixture_host)
guest = pytest.fixture(fixture_guest)


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
    with pytest.raises(RemoteVirtioError, match="not offered"):
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
