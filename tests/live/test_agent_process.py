"""The guest agent as a real process, driven by the host's own balloon device and sideband link.

What they prove: a guest boots, balloons, hints, pauses, moves to a second process over the same memory and
checks itself there; what is refused is refused without harm.
"""

import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import xxhash

from host.errors import AgentError, AgentLost
from tests.live.agent_host import (
    BALLOONED,
    HELD,
    HINTED_SHARE,
    MEMORY_BYTES,
    PAGES,
    Host,
    fixture_guest,
    fixture_hosts,
    wait_until,
)

hosts = fixture_hosts
guest = fixture_guest


def hand_over(source: Host, standby: Host, *, epoch: int = 2) -> None:
    """Pause, save and restore over the very same memory, as a migration does over a copy of it."""
    paused = source.link.pause()
    device = source.device.device_state()
    info = source.link.ram()
    try:
        restored = standby.link.restore(
            epoch,
            source.link.save(),
            {
                "features": device.features,
                "num_pages": device.num_pages,
                "actual": device.actual,
                "poison_value": device.poison_value,
                "ring_bases": list(paused.ring_bases),
            },
            info.memfd,
        )
    finally:
        info.close()
    assert restored.image_pages == PAGES
    assert restored.state_digest == xxhash.xxh3_64_intdigest(source.link.save())


def adopt_device(source: Host, standby: Host) -> None:
    """The device's state moves before the restored agent connects."""
    standby.device.adopt_state(source.device.device_state())


def test_a_guest_boots_and_says_what_it_is(guest: Host) -> None:
    hello = guest.link.hello()
    assert (hello.state, hello.guest_epoch, hello.pages, hello.kind) == ("running", 1, PAGES, "ballast")
    assert hello.pid == guest.process.pid
    assert set(hello.workloads) == {"freed-1", "writer-2", "kv-3"}
    assert PAGES * 0.7 < hello.free_pages < PAGES
    assert guest.socket.stat().st_mode & 0o777 == 0o600
    info = guest.link.ram()
    assert info.memory_bytes == MEMORY_BYTES
    assert (info.pagemap_fd is None) == bool(info.write_protect_reason)
    info.close()


def test_the_balloon_takes_pages_and_gives_every_one_back(guest: Host) -> None:
    free_before = guest.link.hello().free_pages
    guest.device.set_num_pages(5000)
    wait_until(lambda: guest.device.status().actual == 5000, "inflation")
    guest.link.pause()
    frames = guest.link.frames()
    assert np.count_nonzero(frames == BALLOONED) == 5000
    assert guest.device.status().inflated_pages == 5000
    guest.link.resume(1)
    guest.device.set_num_pages(0)
    wait_until(lambda: guest.device.status().actual == 0, "deflation")
    hello = guest.link.hello()
    assert (hello.ballooned_pages, hello.free_pages) == (0, free_before)
    guest.link.pause()
    assert guest.link.check(guest.oracle.read_bytes())[1] == []


def test_a_balloon_larger_than_free_memory_stops_and_the_guest_lives(guest: Host) -> None:
    guest.device.set_num_pages(PAGES)
    wait_until(lambda: guest.link.hello().free_pages < PAGES // 50, "a full balloon")
    operations = guest.link.hello().operations
    wait_until(lambda: guest.link.hello().operations > operations, "the guest works on")
    guest.device.set_num_pages(0)
    wait_until(lambda: guest.device.status().actual == 0, "deflation")


def test_a_report_hints_what_is_free_and_holds_it_until_done(guest: Host) -> None:
    free_before = guest.link.hello().free_pages
    hinted = guest.hint()
    assert np.count_nonzero(hinted) >= HINTED_SHARE * free_before
    guest.link.pause()
    frames = guest.link.frames()
    assert np.array_equal(frames == HELD, hinted)
    guest.link.resume(1)
    again = guest.hint()
    assert not (again & hinted).any(), "a block that is held is not hinted again"
    guest.device.hints_done()
    wait_until(lambda: guest.link.hello().held_pages == 0, "DONE gives all blocks back")
    assert guest.link.hello().free_pages == free_before
    assert np.count_nonzero(guest.hint()) >= HINTED_SHARE * free_before


def test_paused_is_paused_and_resumed_goes_on(guest: Host) -> None:
    first = guest.link.pause()
    assert guest.link.pause() == first, "pausing is idempotent"
    before, beats = guest.ram_digest(), guest.beat_records()
    assert not threading.Event().wait(0.05)
    assert guest.ram_digest() == before
    assert guest.beat_records() == beats
    for _ in range(2):
        guest.link.resume(1)
    wait_until(lambda: len(guest.beat_records()) > len(beats) + 10, "beats")
    records = guest.beat_records()
    counters = [beat for _, _, beat in records]
    assert counters == list(range(1, len(records) + 1))
    gaps = np.diff([at for at, _, _ in records])
    assert gaps.max() >= 50_000_000, "the beats show the pause"
    assert records[len(beats)][0] > first.at_ns


def test_resume_at_another_epoch_is_refused(guest: Host) -> None:
    guest.link.pause()
    for epoch in (0, 2):
        with pytest.raises(AgentError, match="epoch"):
            guest.link.resume(epoch)
    assert guest.link.hello().state == "paused"
    guest.link.resume(1)
    assert guest.link.hello().state == "running"


def test_a_frozen_guest_never_runs_again(guest: Host) -> None:
    guest.link.pause()
    guest.link.freeze()
    with pytest.raises(AgentError, match="frozen"):
        guest.link.resume(1)
    with pytest.raises(AgentError, match="frozen"):
        guest.link.run(1)
    beats = guest.beat_records()
    assert guest.link.frames().size == PAGES
    assert guest.beat_records() == beats
    guest.link.shutdown()
    assert guest.process.wait(20) == 0


@pytest.mark.parametrize("op", ["save", "frames", "freeze", "discard"])
def test_what_a_running_guest_cannot_do_is_refused(guest: Host, op: str) -> None:
    with pytest.raises(AgentError, match="running"):
        getattr(guest.link, op)()
    assert guest.link.hello().state == "running"


def test_the_guest_moves_to_another_process_and_runs_on(guest: Host, hosts: Callable[..., Host]) -> None:
    standby: Host = hosts("b", None).start_agent().start_node()
    assert standby.link.hello().state == "standby"
    guest.device.set_num_pages(3000)
    wait_until(lambda: guest.device.status().actual == 3000, "inflation")
    hinted = guest.hint()
    hand_over(guest, standby)
    assert standby.link.hello().state == "restored"
    digest = guest.ram_digest()
    assert standby.ram_digest() == digest, "restoring writes nothing"
    guest.link.freeze()
    adopt_device(guest, standby)
    started_at_ns = standby.link.run(2)
    assert standby.link.run(2) == started_at_ns, "running is idempotent"
    standby.wait_ready()
    hello = standby.link.hello()
    assert (hello.guest_epoch, hello.ballooned_pages, hello.held_pages) == (2, 3000, int(hinted.sum()))
    standby.device.hints_done()
    wait_until(lambda: standby.link.hello().held_pages == 0, "DONE at the new host")
    operations = standby.link.hello().operations
    wait_until(lambda: standby.link.hello().operations > operations + 300, "the workload runs on")
    standby.device.set_num_pages(0)
    wait_until(lambda: standby.device.status().actual == 0, "the balloon deflates at the new host")
    standby.link.pause()
    items, problems = standby.link.check(guest.oracle.read_bytes() + standby.oracle.read_bytes())
    assert problems == []
    assert items > 2000
    last, first = guest.beat_records()[-1], standby.beat_records()[0]
    assert first[1:] == (2, last[2] + 1), "the beat counter goes on in the next epoch"


def test_an_image_of_another_epoch_or_device_is_refused_and_the_next_one_taken(
    guest: Host, hosts: Callable[..., Host]
) -> None:
    standby: Host = hosts("b", None).start_agent().start_node()
    for epoch in (1, 3):
        with pytest.raises(AgentError, match="epoch"):
            hand_over(guest, standby, epoch=epoch)
    state, info = guest.link.save(), guest.link.ram()
    device: dict[str, object] = {"features": 1, "num_pages": 0, "actual": 0, "poison_value": 0}
    with pytest.raises(AgentError, match="rings"):
        standby.link.restore(2, state, device | {"ring_bases": [9, 9, 9, 9, 9]}, info.memfd)
    bases = list(guest.link.pause().ring_bases)
    with pytest.raises(AgentError, match="features"):
        standby.link.restore(2, state, device | {"ring_bases": bases}, info.memfd)
    with pytest.raises(AgentError, match="state"):
        standby.link.restore(2, b"{}", device | {"ring_bases": bases}, info.memfd)
    empty = os.memfd_create("empty")
    os.ftruncate(empty, MEMORY_BYTES)
    with pytest.raises(AgentError, match="boot page"):
        standby.link.restore(2, state, device | {"ring_bases": bases}, empty)
    os.ftruncate(empty, 4096)
    with pytest.raises(AgentError, match="bytes"):
        standby.link.restore(2, state, device | {"ring_bases": bases}, empty)
    os.close(empty)
    info.close()
    assert standby.link.hello().state == "standby"
    hand_over(guest, standby)
    with pytest.raises(AgentError, match="epoch"):
        standby.link.run(3)
    assert standby.link.hello().state == "restored"


def test_a_discarded_image_leaves_a_standby_and_the_source_resumes(
    guest: Host, hosts: Callable[..., Host]
) -> None:
    standby: Host = hosts("b", None).start_agent().start_node()
    hand_over(guest, standby)
    standby.link.discard()
    standby.link.discard()
    assert standby.link.hello().state == "standby"
    with pytest.raises(AgentError, match="standby"):
        standby.link.run(2)
    guest.link.resume(1)
    operations = guest.link.hello().operations
    wait_until(lambda: guest.link.hello().operations > operations, "the source goes on")
    hand_over(guest, standby)
    assert guest.link.check(guest.oracle.read_bytes())[1] == []


def test_the_guest_outlives_its_node_and_takes_the_next_one(guest: Host) -> None:
    guest.device.set_num_pages(1000)
    wait_until(lambda: guest.device.status().actual == 1000, "inflation")
    guest.hint()
    guest.stop_node()
    beats = len(guest.beat_records())
    wait_until(lambda: len(guest.beat_records()) > beats + 20, "the guest runs on without a node")
    guest.start_node()
    guest.wait_ready()
    wait_until(lambda: guest.link.hello().ballooned_pages == 0, "the new device wants no balloon")
    guest.device.hints_done()
    wait_until(lambda: guest.link.hello().held_pages == 0, "DONE by the new device")
    guest.device.set_num_pages(500)
    wait_until(lambda: guest.device.status().actual == 500, "inflation by the new device")
    free = guest.link.hello().free_pages
    assert np.count_nonzero(guest.hint()) >= HINTED_SHARE * free


def test_a_node_that_dies_during_the_pause_finds_the_guest_paused(guest: Host) -> None:
    paused = guest.link.pause()
    guest.stop_node()
    guest.start_node()
    assert guest.link.hello().state == "paused"
    assert guest.link.pause() == paused
    guest.link.resume(1)
    guest.wait_ready()
    assert guest.hint().any()


def test_pausing_without_any_device_takes_the_bases_from_ram(guest: Host) -> None:
    guest.hint()
    guest.device.stop()
    wait_until(lambda: not guest.link.hello().balloon_ready, "the device is seen to be away")
    bases = guest.link.pause().ring_bases
    assert bases[3] > 10, "id, blocks and STOP were all used"
    guest.start_node()
    guest.link.resume(1)
    guest.wait_ready()
    assert guest.hint().size == PAGES


def test_the_newest_node_is_the_one_served(guest: Host) -> None:
    old = guest.link
    guest.connect()
    assert guest.link.hello().state == "running"
    with pytest.raises(AgentLost):
        old.hello()
    old.close()


def test_throttling_slows_the_guest_and_not_the_pause(guest: Host) -> None:
    guest.link.throttle(99)
    started = time.monotonic()
    guest.link.pause()
    assert time.monotonic() - started < 1
    guest.link.resume(1)
    guest.link.throttle(0)
    operations = guest.link.hello().operations
    wait_until(lambda: guest.link.hello().operations > operations + 100, "full speed again")


def test_a_throttled_guest_does_less_by_the_share_that_is_taken(guest: Host) -> None:
    def seconds_for(operations: int) -> float:
        wanted = guest.link.hello().operations + operations
        started = time.monotonic()
        wait_until(lambda: guest.link.hello().operations >= wanted, "the workload to go on")
        return time.monotonic() - started

    free_s = seconds_for(400)
    guest.link.throttle(80)
    throttled_s = seconds_for(400)
    guest.link.throttle(0)
    free_s = min(free_s, seconds_for(400))  # where the machine was busy at first, it may not be now
    assert throttled_s > 3 * free_s  # 5 times, were the machine ours alone
