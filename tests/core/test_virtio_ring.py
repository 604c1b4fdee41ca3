"""The two sides of the split ring joined over one bytearray: what goes in comes out, once and in order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from virtio.errors import (
    DeviceProtocolError,
    GuestProtocolError,
    LocalVirtioError,
    RemoteVirtioError,
    RingFull,
)
from virtio.split_ring import (
    Chain,
    DeviceRing,
    DriverRing,
    RingLayout,
    Used,
    check_layout,
    layout_at,
    ring_bytes,
)

MEMORY_BYTES = 1 << 20


class Pair:
    """A driver's and a device's side over one memory."""

    def __init__(self, size: int = 8, *, event_idx: bool = False) -> None:
        self.memory = memoryview(bytearray(MEMORY_BYTES))
        self.layout = layout_at(4096, size)
        self.driver = DriverRing(self.memory, self.layout, event_idx=event_idx)
        self.device = DeviceRing(self.memory, self.layout, event_idx=event_idx)

    def words(self) -> memoryview:
        return self.memory.cast("H")


@pytest.fixture(params=[False, True], ids=["flags", "event_idx"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(event_idx=request.param)


def test_layout_is_the_standards():
    # Section 2.7: 16-byte descriptors; flags, idx, ring, event; flags, idx, 8-byte elements, event.
    assert layout_at(0, 256) == RingLayout(desc=0, avail=4096, used=4096 + 4 + 512 + 2 + 2, size=256)
    assert ring_bytes(256) == 4096 + 520 + 2054 + 2
    assert ring_bytes(256) % 16 == 0
    check_layout(layout_at(0, 256), ring_bytes(256))


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(0, 128, 160, 7),
        RingLayout(0, 128, 160, 0),
        RingLayout(0, 128, 160, 1 << 16),
        RingLayout(8, 256, 512, 8),
        RingLayout(0, 129, 160, 8),
        RingLayout(0, 128, 162, 8),
        RingLayout(MEMORY_BYTES - 64, 128, 160, 8),
        RingLayout(0, MEMORY_BYTES, 160, 8),
        RingLayout(0, 128, (1 << 64) - 4, 8),
        RingLayout(-16, 128, 160, 8),
    ],
)
def test_an_illegal_layout_is_the_guests_fault_for_a_device_and_ours_for_a_driver(layout: RingLayout):
    memory = memoryview(bytearray(MEMORY_BYTES))
    with pytest.raises(GuestProtocolError) as caught:
        DeviceRing(memory, layout)
    assert caught.value.kind == "ring_layout"
    with pytest.raises(LocalVirtioError):
        DriverRing(memory, layout)


def test_a_chain_arrives_as_it_was_added_and_comes_back_with_its_token(pair: Pair):
    head = pair.driver.add([(0x10000, 4), (0x10010, 8)], [(0x20000, 4096)], "mine")
    assert pair.device.pop() is None, "nothing is visible before publish"
    assert pair.driver.publish()
    assert pair.device.pop() == Chain(head, [(0x10000, 4), (0x10010, 8)], [(0x20000, 4096)])
    assert pair.device.pop() is None
    pair.device.push(head, 77)
    assert pair.driver.used() == []
    assert pair.device.publish()
    assert pair.driver.used() == [Used("mine", head, 77)]
    assert pair.driver.free_descriptors == 8


def test_an_indirect_chain_takes_one_descriptor(pair: Pair):
    buffers = [(0x10000 + 64 * index, 64) for index in range(6)]
    head = pair.driver.add(
        buffers[:2], buffers[2:], 5, indirect_table=0x30008
    )  # the table needs no alignment
    assert pair.driver.free_descriptors == 7
    pair.driver.publish()
    assert pair.device.pop_all() == [Chain(head, buffers[:2], buffers[2:])]
    pair.device.push(head)
    pair.device.publish()
    assert pair.driver.used() == [Used(5, head, 0)]


def test_direct_descriptors_may_end_in_an_indirect_one(pair: Pair):
    # Section 2.7.7.2 obliges devices to take it; no driver of ours makes it.
    pair.driver.add([(0x10000, 4)], [(0, 1)], None)
    table = np.frombuffer(pair.memory, np.dtype("<u8,<u4,<u2,<u2"), count=8, offset=pair.layout.desc)
    table[1] = (0x30000, 32, 4, 0)
    entries = np.frombuffer(pair.memory, table.dtype, count=2, offset=0x30000)
    entries[0] = (0x40000, 16, 1, 1)
    entries[1] = (0x50000, 4096, 2, 0)
    pair.driver.publish()
    assert pair.device.pop() == Chain(0, [(0x10000, 4), (0x40000, 16)], [(0x50000, 4096)])


def test_a_full_ring_refuses_and_changes_nothing(pair: Pair):
    pair.driver.add([(0, 1)] * 5, [], None)
    with pytest.raises(RingFull):
        pair.driver.add([(0, 1)] * 4, [], None)
    assert pair.driver.free_descriptors == 3
    pair.driver.add([(0, 1)] * 3, [], None)
    assert pair.driver.free_descriptors == 0
    with pytest.raises(RingFull):
        pair.driver.add([(0, 1)], [], None, indirect_table=0x1000)


def test_add_inbufs_fills_what_fits_and_keeps_the_reserve():
    pair = Pair(size=1024)
    addresses = np.arange(2000, dtype=np.uint64) * 256
    lengths = np.full(2000, 256, np.uint32)
    pair.driver.add([(0x100, 4)], [], None)
    assert pair.driver.add_inbufs(addresses, lengths, reserve=1) == 1022
    assert pair.driver.free_descriptors == 1
    pair.driver.publish()
    chains = pair.device.pop_all()
    assert [chain.writable for chain in chains[1:]] == [[(256 * index, 256)] for index in range(1022)]
    pair.device.push_many([chain.head for chain in chains])
    pair.device.publish()
    assert pair.driver.discard_used() == 1023
    assert pair.driver.free_descriptors == 1024


def test_both_sides_wrap_over_65536_entries(pair: Pair):
    """70,000 chains through a ring of 8: indices wrap, slots wrap, and every buffer arrives in its turn."""
    for first in range(0, 70_000, 7):
        addresses = np.arange(first, first + 7, dtype=np.uint64)
        assert pair.driver.add_inbufs(addresses, np.full(7, 4, np.uint32)) == 7
        assert pair.driver.publish()
        chains = pair.device.pop_all()
        assert [chain.writable[0][0] for chain in chains] == list(range(first, first + 7))
        pair.device.push_many([chain.head for chain in chains])
        assert pair.device.publish()
        assert pair.driver.discard_used() == 7
    assert pair.device.next_avail == 70_000 & 0xFFFF


def test_every_device_store_is_in_its_log(pair: Pair):
    pair.device.take_stores()
    for round_index in range(5):
        pair.driver.add_inbufs(np.arange(3, dtype=np.uint64), np.full(3, 4, np.uint32))
        pair.driver.publish()
        before = bytes(pair.memory)
        chains = pair.device.pop_all()
        pair.device.push(chains[0].head, round_index + 1)
        pair.device.push_many([chain.head for chain in chains[1:]])
        pair.device.publish()
        pair.device.pop_all()
        changed = {at for at in range(MEMORY_BYTES // 16) if pair.memory[at] != before[at]}
        logged = {
            at for address, length in pair.device.take_stores() for at in range(address, address + length)
        }
        assert changed <= logged
        assert pair.layout.used <= min(logged)
        pair.driver.used()
    assert pair.device.take_stores() == []


def test_an_undrained_store_log_becomes_the_whole_used_ring():
    pair = Pair()
    for _ in range(5000):
        pair.driver.add([(0, 1)], [], None)
        pair.driver.publish()
        pair.device.push(pair.device.pop_all()[0].head)
        pair.device.publish()
        pair.driver.used()
    stores = pair.device.take_stores()
    assert len(stores) <= 4096 + 1
    assert (pair.layout.used, 6 + 8 * 8) in stores


def test_suppressed_interrupts_are_not_sent_and_enabling_says_to_look_again(pair: Pair):
    pair.driver.disable_interrupts()
    for before, name in ((None, "a"), ("a", "b"), ("b", "c")):
        assert [used.token for used in pair.driver.used()] == ([before] if before else [])
        pair.driver.add([(0, 1)], [], name)
        pair.driver.publish()
        pair.device.push(pair.device.pop_all()[0].head)
        assert not pair.device.publish()
    assert pair.driver.enable_interrupts(), "one is there already"
    assert [used.token for used in pair.driver.used()] == ["c"]
    assert not pair.driver.enable_interrupts()
    pair.driver.add([(0, 1)], [], "b")
    pair.driver.publish()
    pair.device.push(pair.device.pop_all()[0].head)
    assert pair.device.publish()


def test_with_an_event_index_a_busy_device_needs_no_second_kick():
    pair = Pair(event_idx=True)
    pair.driver.add([(0, 1)], [], None)
    assert pair.driver.publish()
    pair.driver.add([(0, 1)], [], None)
    assert not pair.driver.publish(), "the device has not looked since the first kick"
    assert len(pair.device.pop_all()) == 2
    pair.driver.add([(0, 1)], [], None)
    assert pair.device.pop_all() == []
    assert pair.driver.publish(), "it found the ring empty and asked for a kick"


def test_a_stopped_ring_goes_on_with_another_device_at_its_base(pair: Pair):
    heads = [pair.driver.add([(0, 1)], [], token) for token in "abc"]
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    pair.device.push(chain.head)
    pair.device.publish()
    held = pair.device.pop()
    assert held is not None
    pair.device.unpop(held.head)
    event_idx = pair.device._event_idx
    other = DeviceRing(pair.memory, pair.layout, next_avail=pair.device.next_avail, event_idx=event_idx)
    assert [chain.head for chain in other.pop_all()] == heads[1:]
    for head in heads[1:]:
        other.push(head)
    other.publish()
    assert [used.token for used in pair.driver.used()] == ["a", "b", "c"]


def test_unpop_takes_only_the_newest_chain_back(pair: Pair):
    pair.driver.add([(0, 1)], [], None)
    pair.driver.add([(0, 1)], [], None)
    pair.driver.publish()
    first, second = pair.device.pop_all()
    with pytest.raises(LocalVirtioError):
        pair.device.unpop(first.head)
    pair.device.unpop(second.head)
    with pytest.raises(LocalVirtioError):
        pair.device.push(second.head)
    assert pair.device.pop() == second


def test_a_device_that_vanished_is_replaced_at_the_used_index(pair: Pair):
    for token in "abc":
        pair.driver.add([(0, 1)], [], token)
    pair.driver.publish()
    chains = pair.device.pop_all()
    pair.device.push(chains[0].head)
    pair.device.publish()
    assert pair.driver.device_base == 1
    other = DeviceRing(pair.memory, pair.layout, next_avail=pair.driver.device_base)
    assert other.pop_all() == chains[1:]


def test_a_saved_driver_goes_on_over_a_copy_of_memory(pair: Pair):
    pair.driver.add([(1, 1), (2, 2)], [(3, 3)], "three")
    pair.driver.add([(4, 4)], [(5, 5)], 9, indirect_table=0x30000)
    pair.driver.add_inbufs(np.array([6], np.uint64), np.array([6], np.uint32))
    pair.driver.publish()
    chains = pair.device.pop_all()
    saved = json.loads(json.dumps(pair.driver.save()))
    memory = memoryview(bytearray(pair.memory))
    event_idx = pair.device._event_idx
    driver = DriverRing(memory, pair.layout, event_idx=event_idx)
    driver.restore(saved)
    assert driver.free_descriptors == 8 - 5
    device = DeviceRing(memory, pair.layout, event_idx=event_idx)
    assert device.pop_all() == chains
    device.push_many([chain.head for chain in chains])
    device.publish()
    assert [used.token for used in driver.used()] == ["three", 9, None]
    assert driver.free_descriptors == 8


def test_saved_state_is_small_for_a_full_ring():
    pair = Pair(size=1024)
    pair.driver.add_inbufs(np.zeros(1024, np.uint64), np.full(1024, 4, np.uint32))
    assert len(json.dumps(pair.driver.save())) < 512


def test_a_token_that_would_not_survive_is_refused_at_save(pair: Pair):
    pair.driver.add([(0, 1)], [], object())
    with pytest.raises(LocalVirtioError):
        pair.driver.save()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 16},
        {"avail": 65536},
        {"seen": True},
        {"interrupts": 1},
        {"heads": "zz"},
        {"heads": "0f0f"},
        {"heads": 7},
        {"tokens": [[5, "not in flight"]]},
        {"tokens": 3},
        {"heads": "03"},  # the second descriptor belongs to the first chain
    ],
)
def test_saved_state_that_does_not_fit_is_refused(change: dict[str, object]):
    pair = Pair()
    pair.driver.add([(1, 1), (2, 2)], [], "a")
    saved = pair.driver.save() | change
    with pytest.raises(RemoteVirtioError) as caught:
        DriverRing(pair.memory, pair.layout).restore(saved)
    assert caught.value.kind == "ring_state"


@pytest.mark.parametrize(
    ("heads", "index", "kind"),
    [([9], 1, "used_head"), ([3], 1, "used_head"), ([0, 0], 2, "used_head"), ([0] * 8, 9, "used_index")],
)
def test_a_device_that_gives_back_what_it_does_not_have_is_found_out(heads: list[int], index: int, kind: str):
    pair = Pair()
    pair.driver.add([(0, 1)], [], None)
    pair.driver.publish()
    elements = pair.memory[pair.layout.used + 4 :][: 8 * 8].cast("I")
    for slot, head in enumerate(heads):
        elements[2 * slot] = head
    pair.words()[(pair.layout.used >> 1) + 1] = index
    with pytest.raises(DeviceProtocolError) as caught:
        pair.driver.used()
    assert caught.value.kind == kind


def test_a_device_gives_back_only_what_it_holds(pair: Pair):
    pair.driver.add([(0, 1)], [], None)
    pair.driver.publish()
    chain = pair.device.pop()
    assert chain is not None
    for heads in ([chain.head, chain.head], [chain.head, 5], [8], [-1]):
        with pytest.raises(LocalVirtioError):
            pair.device.push_many(heads)
    with pytest.raises(LocalVirtioError):
        pair.device.push(chain.head, 1 << 32)
    with pytest.raises(LocalVirtioError):
        pair.device.push(7)


@pytest.mark.parametrize("buffers", [[], [(0, 0)], [(0, 1 << 31), (0, 1 << 31)], [(0, 1)] * 9])
def test_a_driver_adds_no_illegal_chain(pair: Pair, buffers: list[tuple[int, int]]):
    with pytest.raises(LocalVirtioError):
        pair.driver.add(buffers, [], None)
    with pytest.raises(LocalVirtioError):
        pair.driver.add_inbufs(np.zeros(2, np.uint64), np.zeros(2, np.uint32))


def test_closed_rings_let_go_of_the_memory():
    memory = bytearray(MEMORY_BYTES)
    view = memoryview(memory)
    driver, device = DriverRing(view, layout_at(0, 8)), DeviceRing(view, layout_at(0, 8))
    driver.close()
    device.close()
    view.release()
    memory.clear()  # raises BufferError while anything still looks at it
