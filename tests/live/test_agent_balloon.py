"""The balloon driver's hands inside one process: pressure, a device that hangs, a device that goes away.

What they prove: held blocks and ballooned pages come back to a guest that needs them, a report ends within its
bound whatever the device does, and its STOP always finds a place in the ring.
"""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guest_agent.errors import OutOfMemory
from guest_agent.frames import FrameKind
from guest_agent.hint_report import HINT_ORDER
from guest_agent.ring_area import RING_SIZES
from host.balloon_server import BalloonServer
from host.device_log import DeviceLog
from tests.live.balloon_guest import Guest, fixture_device, fixture_guests, wait_until
from virtio.balloon import CMD_ID_DONE, CMD_ID_FIRST, CMD_ID_STOP, QUEUE_HINT, BalloonConfig
from virtio.errors import RemoteVirtioError
from virtio.split_ring import DeviceRing

guests = fixture_guests
device = fixture_device

FEATURES = 1 << 32 | 0b1101  # VERSION_1, FREE_PAGE_HINT, DEFLATE_ON_OOM, MUST_TELL_HOST


def hold(guest: Guest, device: BalloonServer) -> int:
    """Report once; pages held."""
    device.open_hints()
    wait_until(lambda: device.status().hint_state == "stopped", "the report")
    device.close_hints()
    return guest.balloon.held_pages


def test_held_blocks_come_back_under_pressure_and_the_rest_at_done(
    guests: Callable[[int], Guest], device: BalloonServer
) -> None:
    guest = guests(256 << 20)
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    held = hold(guest, device)
    assert held > 0.9 * guest.buddy.pages
    wanted = guest.buddy.free_pages + 5000
    pfns = guest.take(wanted)
    assert pfns.size == wanted
    assert 0 < held - guest.balloon.held_pages <= 5000 + 8 * 1024
    assert (guest.frames.kind[pfns.astype(np.int64)] == FrameKind.ANON).all()
    assert guest.buddy.check() == []
    with guest.gate:
        guest.buddy.free_bulk(pfns)
    device.hints_done()
    wait_until(lambda: guest.balloon.held_pages == 0, "DONE")
    assert guest.buddy.check() == []


def test_pressure_may_take_every_held_block_and_then_memory_is_out(
    guests: Callable[[int], Guest], device: BalloonServer
) -> None:
    guest = guests(64 << 20)
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    hold(guest, device)
    free = guest.buddy.free_pages + guest.balloon.held_pages
    guest.take(free)
    assert (guest.balloon.held_pages, guest.buddy.free_pages) == (0, 0)
    with pytest.raises(OutOfMemory):
        guest.take(1)


def test_the_balloon_deflates_when_memory_is_out(
    guests: Callable[[int], Guest], device: BalloonServer
) -> None:
    guest = guests(64 << 20)
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    device.set_num_pages(8000)
    wait_until(lambda: device.status().actual == 8000, "inflation")
    pfns = guest.take(guest.buddy.free_pages + 1000)
    assert guest.balloon.ballooned_pages <= 7000
    wait_until(lambda: device.status().actual == guest.balloon.ballooned_pages, "the host is told")
    assert guest.buddy.check() == []
    assert (guest.frames.kind[pfns.astype(np.int64)] == FrameKind.ANON).all()


def test_without_its_device_a_ballooned_guest_is_out_of_memory_not_stuck(
    guests: Callable[[int], Guest], device: BalloonServer
) -> None:
    guest = guests(64 << 20)
    guest.start()
    wait_until(lambda: device.status().ready, "balloon ready")
    device.set_num_pages(8000)
    wait_until(lambda: device.status().actual == 8000, "inflation")
    device.stop()
    started = time.monotonic()
    with pytest.raises(OutOfMemory):
        guest.take(guest.buddy.free_pages + 1000)
    assert time.monotonic() - started < 2
    guest.gate.pause(1)


class HungDevice:
    """A hint queue that is looked at by the test alone: nobody serves it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        guest.balloon.negotiate(FEATURES)
        self.ring = DeviceRing(guest.ram.memory, guest.area.layouts[QUEUE_HINT])

    def show(self, command_id: int) -> None:
        self.guest.balloon.config_changed(BalloonConfig(free_page_hint_cmd_id=command_id))

    def chains(self) -> list[tuple[int | None, int]]:
        """What waits in the ring: (command id, 0) or (None, bytes of the free block); all given back."""
        found: list[tuple[int | None, int]] = []
        chains = self.ring.pop_all()
        for chain in chains:
            if chain.readable:
                address, length = chain.readable[0]
                found.append((int.from_bytes(self.guest.ram.memory[address : address + length], "little"), 0))
            else:
                found.append((None, chain.writable[0][1]))
        self.ring.push_many([chain.head for chain in chains])
        self.ring.publish()
        return found


def test_a_report_to_a_device_that_takes_nothing_ends_with_stop_in_the_last_slot(
    guests: Callable[[int], Guest],
) -> None:
    guest = guests(6 << 30)  # more blocks than the ring has entries; nothing of it is touched
    device = HungDevice(guest)
    guest.start(connect=False)
    device.show(CMD_ID_FIRST)
    wait_until(lambda: guest.balloon.held_pages >= (RING_SIZES[QUEUE_HINT] - 2) << HINT_ORDER, "a full ring")
    wait_until(lambda: not guest.balloon.reporting, "the bound")
    chains = device.chains()
    assert len(chains) == RING_SIZES[QUEUE_HINT]
    assert chains[0] == (CMD_ID_FIRST, 0)
    assert chains[-1] == (CMD_ID_STOP, 0)
    assert set(chains[1:-1]) == {(None, 4 << 20)}
    device.show(CMD_ID_DONE)
    wait_until(lambda: guest.balloon.held_pages == 0, "DONE")
    assert guest.buddy.check() == []


def test_a_report_is_ended_by_the_host_and_the_next_id_is_reported_for(
    guests: Callable[[int], Guest],
) -> None:
    guest = guests(6 << 30)
    device = HungDevice(guest)
    guest.start(connect=False)
    device.show(CMD_ID_FIRST)
    wait_until(lambda: guest.balloon.held_pages > 0, "a report")
    device.show(CMD_ID_FIRST + 1)
    seen: list[tuple[int | None, int]] = []

    def two_reports() -> bool:
        seen.extend(device.chains())
        guest.balloon.wake()  # the interrupt
        return [command for command, _ in seen].count(CMD_ID_STOP) == 2

    wait_until(two_reports, "two reports")
    commands = [command for command, _ in seen if command is not None]
    assert commands == [CMD_ID_FIRST, CMD_ID_STOP, CMD_ID_FIRST + 1, CMD_ID_STOP]


def test_the_same_id_is_not_reported_for_twice(guests: Callable[[int], Guest]) -> None:
    guest = guests(64 << 20)
    device = HungDevice(guest)
    guest.start(connect=False)
    device.show(CMD_ID_FIRST)
    wait_until(lambda: guest.balloon.held_pages > 0 and not guest.balloon.reporting, "a report")
    first = device.chains()
    device.show(CMD_ID_FIRST)
    wait_until(lambda: guest.balloon.config_handled, "the same id again")
    assert device.chains() == []
    device.show(CMD_ID_FIRST + 1)
    wait_until(lambda: guest.balloon.config_handled and not guest.balloon.reporting, "the next report")
    assert first[0] == (CMD_ID_FIRST, 0)
    assert device.chains() == [(CMD_ID_FIRST + 1, 0), (CMD_ID_STOP, 0)], "all blocks are held already"


def test_a_device_that_lacks_an_agreed_feature_is_not_taken(guests: Callable[[int], Guest]) -> None:
    guest = guests(64 << 20)
    agreed = guest.balloon.negotiate(FEATURES)
    assert guest.balloon.negotiate(FEATURES | 1 << 5) == agreed
    with pytest.raises(RemoteVirtioError, match="features"):
        guest.balloon.negotiate(1 << 32)
    assert guest.balloon.features == agreed


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="silence"),
        pytest.param(b"\xff" * 64, id="garbage"),
        pytest.param(b"\x01\x00\x00\x00\x05\x00\x00\x00\x08\x00\x00\x00", id="half-a-reply"),
        pytest.param(b"\x02\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00", id="another-reply"),
    ],
)
def test_a_node_that_talks_nonsense_or_nothing_is_left_for_the_next(
    guests: Callable[[int], Guest], tmp_path: Path, answer: bytes | None
) -> None:
    guest = guests(64 << 20)
    path = tmp_path / "vhost"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(10)
        guest.start()
        connection, _ = listener.accept()
        with connection:
            if answer is not None:  # else silence: the guest must not be stuck in it
                connection.sendall(answer)
            started = time.monotonic()
            guest.gate.pause(1)
            assert guest.front_end.stop_rings() == [0] * 5
            assert time.monotonic() - started < 3
    path.unlink()
    guest.gate.open()
    guest.front_end.start_rings(None)
    server = BalloonServer(path, sink=lambda _: None, log=DeviceLog())
    server.start()
    wait_until(lambda: server.status().ready, "the next node")
    assert hold(guest, server) > 0
    server.stop()


# --- the end ------------------------------------------------------------------------------------------


class ShutBehind:
    """The guest's gate, shut as soon as somebody is inside, and the balloon's thread told of it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def __enter__(self) -> None:
        self.guest.gate.__enter__()
        self.guest.gate.shut()
        self.guest.balloon.wake()

    def __exit__(self, *error: object) -> None:
        self.guest.gate.__exit__(None, None, None)


def test_a_guest_that_ends_while_its_balloon_is_at_work_ends(guests: Callable[..., Guest]) -> None:
    """Who is inside must not take the wake that is meant for the next look, and sleep on."""
    guest = guests(64 << 20)
    guest.balloon._gate = ShutBehind(guest)  # type: ignore[assignment]
    guest.start(connect=False)
    guest.threads[0].join(10)
    assert not guest.threads[0].is_alive()
