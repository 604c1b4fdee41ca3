"""Configuration space, device and driver of the balloon, apart and joined over one memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import balloon
from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_LAST,
    CMD_ID_STOP,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_SG,
    F_VERSION_1,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    BalloonConfig,
    command_id_after,
    mask,
)
from virtio.balloon_device import BalloonDevice, DeviceState, reader
from virtio.balloon_driver import (
    BalloonDriver,
    ConfigChanged,
    DeflatePfns,
    DriverCommand,
    DriverEvent,
    InflatePfns,
    OutOfMemory,
    ReleaseHeld,
    ReportEnded,
    Retry,
    StartReport,
    StopReport,
    Submitted,
    UsedBuffers,
    WriteActual,
)
from virtio.errors import DeviceProtocolError, GuestProtocolError, LocalVirtioError, RemoteVirtioError
from virtio.split_ring import Chain, DeviceRing
from virtio.testing import MockDriver

PAGES = 4096


# The numbers and the configuration space.


def test_the_numbers_are_the_standards():
    names = ("MUST_TELL_HOST", "STATS_VQ", "DEFLATE_ON_OOM", "FREE_PAGE_HINT", "PAGE_POISON", "REPORTING")
    assert [getattr(balloon, f"F_{name}") for name in names] == list(range(6))
    assert (F_SG, F_VERSION_1, CMD_ID_STOP, CMD_ID_DONE) == (23, 32, 0, 1)
    queues = ("INFLATE", "DEFLATE", "STATS", "HINT", "REPORTING")
    assert [getattr(balloon, f"QUEUE_{name}") for name in queues] == list(range(5))


def test_the_configuration_space_is_16_little_endian_bytes():
    config = BalloonConfig(num_pages=1, actual=0x0203, free_page_hint_cmd_id=0x80000004, poison_val=5)
    assert config.to_bytes() == bytes.fromhex("01000000 03020000 04000080 05000000")
    assert BalloonConfig.from_bytes(config.to_bytes()) == config
    assert config.read(4, 4) == b"\x03\x02\0\0"
    config.write(5, b"\xff")
    assert config.actual == 0xFF03


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (13, 4), (-1, 2), (1 << 32, 1)])
def test_access_outside_the_configuration_space_is_refused(offset: int, size: int):
    with pytest.raises(GuestProtocolError):
        BalloonConfig().read(offset, size)
    with pytest.raises(GuestProtocolError):
        BalloonConfig().write(offset, bytes(size))


def test_ids_count_up_and_wrap():
    ids = [CMD_ID_LAST - 1]
    while len(ids) < 4:
        ids.append(command_id_after(ids[-1]))
    assert ids == [CMD_ID_LAST - 1, CMD_ID_LAST, CMD_ID_FIRST, CMD_ID_FIRST + 1]
    assert command_id_after(5) == CMD_ID_FIRST


# The device.


def device() -> BalloonDevice:
    made = BalloonDevice(PAGES)
    assert made.negotiate(made.features_offered)
    return made


def test_a_device_offers_only_what_it_does():
    with pytest.raises(LocalVirtioError):
        BalloonDevice(PAGES, features_offered=mask(F_VERSION_1, 7))
    with pytest.raises(LocalVirtioError):
        BalloonDevice(PAGES, features_offered=mask(F_FREE_PAGE_HINT))
    made = BalloonDevice(PAGES, features_offered=mask(F_VERSION_1))
    assert not made.negotiate(mask(F_VERSION_1, F_MUST_TELL_HOST))
    assert (made.features, made.guest_errors["features"]) == (0, 1)


def test_the_driver_writes_actual_and_nothing_else():
    made = device()
    assert made.write_config(4, (7).to_bytes(4, "little"))
    for offset, data in (
        (0, bytes(4)),
        (8, bytes(4)),
        (12, bytes(3)),
        (4, b"\0"),
        (4, bytes(8)),
        (99, bytes(4)),
    ):
        assert not made.write_config(offset, data)
    assert made.config.actual == 7
    assert made.guest_errors == {"config_write": 6}


@pytest.mark.parametrize("num_pages", [-1, PAGES + 1])
def test_a_balloon_is_not_larger_than_the_guest(num_pages: int):
    with pytest.raises(LocalVirtioError):
        device().set_num_pages(num_pages)


def test_a_pfn_array_may_lie_in_several_buffers():
    memory = memoryview(bytearray(4096))
    memory[0:8] = np.array([3, 1], "<u4").tobytes()
    memory[100:104] = np.array([2], "<u4").tobytes()
    result = device().process_inflate([Chain(0, [(0, 8), (100, 4)], [])], reader(memory))
    assert result.pfns.tolist() == [1, 2, 3]
    assert (result.first.tolist(), result.count.tolist()) == ([1], [3])


@pytest.mark.parametrize("lengths", [[3], [4, 1], [], [4096 * 4, 4]])
def test_an_odd_or_huge_pfn_array_is_refused_unread(lengths: list[int]):
    made = device()

    def read(address: int, length: int) -> bytes:
        raise AssertionError((address, length))

    assert made.process_deflate([Chain(0, [(0, length) for length in lengths], [])], read).pages == 0
    assert made.guest_errors == {"pfn_array_size": 1}


@given(st.lists(st.integers(0, 2 * PAGES), min_size=1, max_size=256))
def test_inflated_is_the_set_of_pages_inside_ram(pfns: list[int]):
    memory = memoryview(np.array(pfns, "<u4").tobytes())
    result = device().process_inflate([Chain(0, [(0, len(memory))], [])], reader(memory))
    assert result.pfns.tolist() == sorted({pfn for pfn in pfns if pfn < PAGES})
    assert result.rejected == sum(pfn >= PAGES for pfn in pfns)


def test_reads_stay_inside_guest_memory():
    read = reader(memoryview(bytes(16)))
    assert read(8, 8) == bytes(8)
    for address, length in ((8, 9), (17, 0), (-1, 1)):
        with pytest.raises(GuestProtocolError):
            read(address, length)


def test_a_device_moves_and_does_not_issue_an_id_twice():
    source = device()
    source.set_num_pages(100)
    source.write_config(4, (100).to_bytes(4, "little"))
    first = source.open_hints()
    state: DeviceState = json.loads(json.dumps(source.save()))
    assert state == {
        "features": source.features,
        "num_pages": 100,
        "actual": 100,
        "poison_value": 0,
        "next_command_id": first + 1,
        "hints_open": True,
    }
    dest = BalloonDevice(PAGES)
    dest.restore(state)
    dest.hints_done()
    assert dest.read_config() == BalloonConfig(100, 100, CMD_ID_DONE, 0).to_bytes()
    assert dest.open_hints() == first + 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_pages": PAGES + 1},
        {"actual": -1},
        {"poison_value": 1 << 32},
        {"next_command_id": 1},
        {"features": 1 << 7},
        {"features": -1},
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change: dict[str, int]):
    made = device()
    before = made.save()
    with pytest.raises(RemoteVirtioError):
        made.restore(before | change)
    assert made.save() == before


# The driver.


def driver(features: int | None = None, *, batch_pages: int = 256) -> BalloonDriver:
    made = BalloonDriver(batch_pages=batch_pages)
    made.negotiate(
        balloon.mask(F_VERSION_1, F_FREE_PAGE_HINT, F_DEFLATE_ON_OOM) if features is None else features
    )
    return made


def assert_answers(made: BalloonDriver, *lines: DriverEvent | list[DriverCommand]) -> None:
    """A transcript: every event is followed by the commands it must bring."""
    for event, commands in zip(lines[::2], lines[1::2], strict=True):
        assert not isinstance(event, list), "commands without an event"
        assert made.handle(event) == commands, event


def hint_config(command_id: int) -> ConfigChanged:
    return ConfigChanged(BalloonConfig(free_page_hint_cmd_id=command_id))


def test_the_driver_accepts_what_it_wants_of_what_is_offered():
    made = BalloonDriver()
    assert made.negotiate(mask(F_VERSION_1, F_PAGE_POISON, F_MUST_TELL_HOST)) == mask(
        F_VERSION_1, F_MUST_TELL_HOST
    )
    with pytest.raises(DeviceProtocolError):
        made.negotiate(mask(F_MUST_TELL_HOST))


def test_inflation_goes_batch_by_batch_and_actual_follows_the_device():
    assert_answers(
        driver(),
        ConfigChanged(BalloonConfig(num_pages=300)),
        [InflatePfns(256)],
        Submitted(QUEUE_INFLATE, 256),
        [],
        ConfigChanged(BalloonConfig(num_pages=300)),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(256), InflatePfns(44)],
        Submitted(QUEUE_INFLATE, 44),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(300)],
        UsedBuffers(QUEUE_INFLATE),
        [],
        ConfigChanged(BalloonConfig(num_pages=100)),
        [DeflatePfns(200)],
        Submitted(QUEUE_DEFLATE, 200),
        [],
        UsedBuffers(QUEUE_DEFLATE),
        [WriteActual(100)],
    )


def test_a_target_that_turns_around_waits_for_the_inflation_under_way():
    assert_answers(
        driver(),
        ConfigChanged(BalloonConfig(num_pages=10)),
        [InflatePfns(10)],
        Submitted(QUEUE_INFLATE, 10),
        [],
        ConfigChanged(BalloonConfig(num_pages=0)),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(10), DeflatePfns(10)],
    )


def test_short_of_memory_the_driver_rests_until_retry():
    assert_answers(
        driver(),
        ConfigChanged(BalloonConfig(num_pages=100)),
        [InflatePfns(100)],
        Submitted(QUEUE_INFLATE, 30),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(30)],
        ConfigChanged(BalloonConfig(num_pages=100)),
        [],
        Retry(),
        [InflatePfns(70)],
        Submitted(QUEUE_INFLATE, 0),
        [],
        Retry(),
        [InflatePfns(70)],
    )


def test_out_of_memory_deflates_only_if_that_was_negotiated():
    made = driver()
    assert_answers(
        made,
        ConfigChanged(BalloonConfig(num_pages=400)),
        [InflatePfns(256)],
        Submitted(QUEUE_INFLATE, 256),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(256), InflatePfns(144)],
        Submitted(QUEUE_INFLATE, 144),
        [],
        OutOfMemory(),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(400)],
        OutOfMemory(),
        [DeflatePfns(256)],
        Submitted(QUEUE_DEFLATE, 256),
        [],
        UsedBuffers(QUEUE_DEFLATE),
        [WriteActual(144)],  # and not back to 400 at once
    )
    plain = driver(mask(F_VERSION_1))
    assert_answers(
        plain,
        ConfigChanged(BalloonConfig(num_pages=1)),
        [InflatePfns(1)],
        Submitted(QUEUE_INFLATE, 1),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(1)],
        OutOfMemory(),
        [],
    )


def test_a_report_starts_with_a_new_id_once_and_done_releases():
    made = driver()
    assert_answers(
        made,
        hint_config(7),
        [StartReport(7)],
        hint_config(7),
        [],
        ReportEnded(7),
        [],
        hint_config(7),
        [],
        hint_config(CMD_ID_STOP),
        [],
        hint_config(7),
        [],  # an id is never reported for twice
        hint_config(CMD_ID_DONE),
        [ReleaseHeld()],
        hint_config(8),
        [StartReport(8)],
    )
    assert made.report_continues


@pytest.mark.parametrize(
    ("after", "follows"), [(CMD_ID_STOP, []), (CMD_ID_DONE, [ReleaseHeld()]), (9, [StartReport(9)])]
)
def test_a_running_report_ends_before_anything_else_happens(after: int, follows: list[DriverCommand]):
    made = driver()
    assert_answers(
        made, hint_config(8), [StartReport(8)], hint_config(after), [StopReport(8)], hint_config(after), []
    )
    assert not made.report_continues
    assert_answers(made, ReportEnded(8), follows)


def test_without_the_feature_command_ids_mean_nothing():
    assert_answers(driver(mask(F_VERSION_1)), hint_config(7), [])


def test_events_that_cannot_be_are_our_own_mistake():
    made = driver()
    for event in (Submitted(QUEUE_INFLATE, 1), ReportEnded(7)):
        with pytest.raises(LocalVirtioError):
            made.handle(event)
    made.handle(ConfigChanged(BalloonConfig(num_pages=5)))
    for event in (Submitted(QUEUE_DEFLATE, 1), Submitted(QUEUE_INFLATE, 6), Submitted(QUEUE_INFLATE, -1)):
        with pytest.raises(LocalVirtioError):
            made.handle(event)


def test_a_saved_driver_finishes_what_was_submitted_and_forgets_the_report():
    made = driver()
    made.handle(ConfigChanged(BalloonConfig(num_pages=10, free_page_hint_cmd_id=7)))
    made.handle(Submitted(QUEUE_INFLATE, 10))
    restored = BalloonDriver()
    restored.restore(json.loads(json.dumps(made.save())))
    assert not restored.report_continues
    assert_answers(
        restored,
        hint_config(7),
        [],
        ConfigChanged(BalloonConfig(num_pages=10, free_page_hint_cmd_id=7)),
        [],
        UsedBuffers(QUEUE_INFLATE),
        [WriteActual(10)],
        ConfigChanged(BalloonConfig(num_pages=10, free_page_hint_cmd_id=CMD_ID_DONE)),
        [ReleaseHeld()],
    )


def test_what_was_not_submitted_is_asked_for_again_after_restore():
    made = driver()
    made.handle(ConfigChanged(BalloonConfig(num_pages=10)))
    restored = BalloonDriver()
    restored.restore(made.save())
    assert_answers(restored, ConfigChanged(BalloonConfig(num_pages=10)), [InflatePfns(10)])


@pytest.mark.parametrize(
    "change",
    [
        {"actual": -1},
        {"num_pages": True},
        {"features": 1 << 7},
        {"waiting": None},
        {"pending": [QUEUE_DEFLATE, 1]},
        {"pending": [QUEUE_HINT, 1]},
        {"pending": [QUEUE_INFLATE]},
        {"pending": 3},
    ],
)
def test_driver_state_that_cannot_be_is_refused(change: dict[str, object]):
    with pytest.raises(RemoteVirtioError):
        BalloonDriver().restore(driver().save() | change)


# Both, over one memory.


def test_a_4_gib_guest_is_hinted_whole_and_in_order():
    """1023 blocks of 4 MiB: only the rings' memory exists, the blocks are addresses."""
    pages = 1 << 20
    memory = memoryview(bytearray(1 << 20))
    guest = MockDriver(memory, ring_size=2048)
    ring = DeviceRing(memory, guest.layouts[QUEUE_HINT])
    ring._memory = _Pretend(memory, pages * 4096)
    made = BalloonDevice(pages)
    made.negotiate(made.features_offered)
    blocks = [4 << 20] * np.arange(1, 1024, dtype=np.uint64)
    assert guest.report(made.open_hints(), blocks.tolist(), 4 << 20) == 1023
    events = [event for chain in ring.pop_all() for event in made.process_hint(chain, reader(memory))]
    assert [event.pfn_first for event in events[1:-1]] == list(range(1024, pages, 1024))
    assert {event.page_count for event in events[1:-1]} == {1024}


class _Pretend:
    """Says that guest memory is larger than it is; descriptors are still read from what there is."""

    def __init__(self, memory: memoryview, length: int) -> None:
        self.memory = memory
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_hazard_10_a_deflation_that_does_not_fit_is_said_so_and_not_lost():
    memory = memoryview(bytearray(1 << 20))
    guest = MockDriver(memory, ring_size=4)
    for pfn in range(4):
        guest.deflate([pfn])
    with pytest.raises(Exception, match="descriptors wanted"):
        guest.deflate([4])
    ring = DeviceRing(memory, guest.layouts[QUEUE_DEFLATE])
    made = device()
    chains = ring.pop_all()
    back = [made.process_deflate([chain], reader(memory)).pfns.tolist() for chain in chains]
    ring.push_many([chain.head for chain in chains])
    ring.publish()
    assert back == [[0], [1], [2], [3]]
    assert len(guest.used(QUEUE_DEFLATE)) == 4
    assert guest.deflate([4])
