"""A node that dies and comes back: its device goes on where it was, over the same rings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from host.balloon_server import BalloonServer, DeviceState
from host.device_log import DeviceLog
from host.device_store import DeviceStore, KeptState
from host.errors import DeviceNotReady, DeviceStateUnreadable
from tests.live.balloon_peers import BLOCK_PAGES, FEATURES, PAGE_BYTES, WAIT_S, Guest, Host, blocks, wait_for
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    F_PAGE_POISON,
    F_REPORTING,
    F_SG,
    F_STATS_VQ,
    QUEUE_COUNT,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    mask,
)
from virtio.balloon_stats import encode_stats

pytestmark = pytest.mark.live
EVERYTHING = FEATURES | mask(F_STATS_VQ, F_REPORTING, F_PAGE_POISON, F_SG)
FIRST = 40 * BLOCK_PAGES
KEPT = KeptState(
    features=0, num_pages=7, actual=3, poison_value=0, next_command_id=CMD_ID_FIRST + 5, done_owed=False
)


class Node:
    """The device in a process of its own."""

    def __init__(self, directory):
        self.socket = directory / "vhost.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.balloon_node", self.socket, directory / "device.json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout.readline() == '"serving"\n'

    def call(self, name, *arguments):
        """What the device's method returns."""
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait_for(self, **wanted):
        """Ask for the status until these fields are so."""
        for _ in range(20_000):
            status = self.call("status")
            if all(status[name] == value for name, value in wanted.items()):
                return status
        raise AssertionError(f"it never happened: {wanted}")

    def kill(self):
        """SIGKILL: nothing is told, closed or removed."""
        self._process.send_signal(signal.SIGKILL)
        self._end()

    def close(self):
        """The orderly end."""
        self._process.stdin.close()
        self._end()

    def _end(self):
        self._process.wait(WAIT_S)
        self._process.stdin.close()
        self._process.stdout.close()


def again(node, guest, features=EVERYTHING):
    """The same guest's front-end finds a device; its rings go on where their used indices say."""
    found = Guest(node.socket, fd=os.dup(guest.fd), features=features)
    found.driver = guest.driver
    words = found.driver.memory.cast("H")
    found.start([words[(layout.used >> 1) + 1] for layout in found.driver.layouts])
    return found


def test_a_node_that_was_killed_goes_on_with_rings_balloon_hints_and_statistics(tmp_path):
    first = Node(tmp_path)
    guest = Guest(first.socket, features=EVERYTHING)
    first.call("set_num_pages", 77)
    guest.exchange(guest.session.write_config(4, (70).to_bytes(4, "little")))
    guest.driver.stats(encode_stats([(4, 5)]))
    guest.kick(QUEUE_STATS)
    command_id = first.call("open_hints")
    guest.driver.report(command_id, blocks(10, 5), BLOCK_PAGES * PAGE_BYTES)
    guest.kick(QUEUE_HINT)
    guest.wait_used(QUEUE_HINT, 7)
    first.wait_for(stats={"memfree": 5}, hint_state="stopped", actual=70)
    first.kill()
    guest.driver.give(QUEUE_INFLATE, [(FIRST * PAGE_BYTES, PAGE_BYTES)])  # nobody is there to be kicked

    second = Node(tmp_path)
    found = again(second, guest)
    status = second.wait_for(ready=True, inflated_pages=1, stats={"memfree": 5})
    assert (status["num_pages"], status["actual"]) == (77, 70)
    assert (found.config.num_pages, found.config.free_page_hint_cmd_id) == (77, CMD_ID_DONE)
    found.wait_used(QUEUE_INFLATE, 1)
    assert second.call("open_hints") == command_id + 1, (
        "an id that the guest reported for is not issued again"
    )
    assert found.hear().free_page_hint_cmd_id == command_id + 1
    found.driver.report(command_id + 1, blocks(20, 3), BLOCK_PAGES * PAGE_BYTES)
    assert second.call("close_hints") == 3
    second.call("hints_done")
    found.driver.give(QUEUE_REPORTING, [(FIRST * PAGE_BYTES, 8 * PAGE_BYTES)])
    found.kick(QUEUE_REPORTING)
    found.wait_used(QUEUE_REPORTING, 1)

    def answer():
        found.wait_used(QUEUE_STATS, 1)
        found.driver.stats(encode_stats([(4, 6)]))
        found.kick(QUEUE_STATS)

    answering = threading.Thread(target=answer)
    answering.start()
    assert second.call("guest_stats", WAIT_S) == {"memfree": 6}
    answering.join()
    assert second.call("status")["guest_errors"] == {}
    second.close()
    for made in (found, guest):
        made.close()


def test_an_id_is_on_disk_before_the_guest_can_read_it(tmp_path):
    """Killed at the very moment of the announcement, the next node issues another id."""
    node = Node(tmp_path)
    guest = Guest(node.socket)
    seen = node.call("open_hints")
    assert guest.hear().free_page_hint_cmd_id == seen
    node.kill()
    guest.close()
    assert DeviceStore(tmp_path / "device.json").load().next_command_id == seen + 1


def test_an_orderly_end_keeps_the_device_too(tmp_path):
    state = tmp_path / "device.json"
    host = Host(tmp_path / "sock", state)
    guest = Guest(host.path, features=EVERYTHING)
    host.server.set_num_pages(9)
    guest.exchange(guest.session.write_config(12, (0xAAAAAAAA).to_bytes(4, "little")))
    guest.exchange(guest.session.write_config(4, (8).to_bytes(4, "little")))
    host.server.stop()
    kept = DeviceStore(state).load()
    assert (kept.num_pages, kept.actual, kept.poison_value) == (9, 8, 0xAAAAAAAA)
    assert kept.features == guest.session.features
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
    guest.close()


def test_the_device_of_a_guest_that_moved_in_is_kept(tmp_path):
    host = Host(tmp_path / "sock", tmp_path / "device.json")
    host.server.adopt_state(DeviceState(0, 12, 11, 0, CMD_ID_FIRST + 9, True, (0,) * QUEUE_COUNT))
    host.server.stop()
    second = Host(tmp_path / "sock", tmp_path / "device.json")
    guest = Guest(second.path)
    assert (guest.config.num_pages, guest.config.actual) == (12, 11)
    assert guest.config.free_page_hint_cmd_id == CMD_ID_DONE, "it was owed by the host that hinted"
    assert second.server.open_hints() == CMD_ID_FIRST + 9
    guest.close()
    second.server.stop()


@pytest.mark.parametrize(("next_id", "shown"), [(CMD_ID_FIRST, CMD_ID_STOP), (CMD_ID_FIRST + 1, CMD_ID_DONE)])
def test_a_device_that_ever_asked_for_hints_shows_done_again(tmp_path, next_id, shown):
    """A guest that looks rarely may not have read the DONE of before: it would hold its pages for ever."""
    DeviceStore(tmp_path / "device.json").keep(replace(KEPT, next_command_id=next_id))
    host = Host(tmp_path / "sock", tmp_path / "device.json")
    guest = Guest(host.path)
    assert guest.config.free_page_hint_cmd_id == shown
    guest.close()
    host.server.stop()


def test_what_cannot_be_kept_does_not_happen(tmp_path):
    state = tmp_path / "kept" / "device.json"
    state.parent.mkdir()
    host = Host(tmp_path / "sock", state)
    guest = Guest(host.path)
    shutil.rmtree(state.parent)
    for ask in (host.server.open_hints, lambda: host.server.set_num_pages(5)):
        with pytest.raises(DeviceNotReady, match="cannot be kept"):
            ask()
    assert (guest.read_config().free_page_hint_cmd_id, guest.config.num_pages) == (CMD_ID_STOP, 0)
    guest.exchange(guest.session.write_config(4, (8).to_bytes(4, "little")))
    wait_for(lambda: host.server.status().connection_errors.get("state_not_kept"))
    host.server.hints_done()  # DONE reaches the guest whatever the disk says
    assert guest.read_config().free_page_hint_cmd_id == CMD_ID_DONE
    guest.close()
    host.server.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"version": 2}',
        b'{"version": 1, "features": 0}',
        json.dumps({"version": 1, **asdict(KEPT), "num_pages": "7"}).encode(),
        json.dumps({"version": 1, **asdict(KEPT), "next_command_id": 1}).encode(),
        b"[" * 5000,
    ],
)
def test_a_file_that_makes_no_sense_is_no_empty_device(tmp_path, content):
    (tmp_path / "device.json").write_bytes(content)
    with pytest.raises(DeviceStateUnreadable, match="remove it to start"):
        BalloonServer(
            tmp_path / "sock", sink=lambda _: None, log=DeviceLog(), state_path=tmp_path / "device.json"
        )


def test_a_state_is_written_only_when_it_changed(tmp_path):
    store = DeviceStore(tmp_path / "device.json")
    assert store.load() is None
    store.keep(KEPT)
    before = (tmp_path / "device.json").stat().st_ino
    store.keep(KEPT)
    assert (tmp_path / "device.json").stat().st_ino == before
    assert store.load() == KEPT
