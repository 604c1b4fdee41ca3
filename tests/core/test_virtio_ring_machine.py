"""Any sequence of adds, pops, pushes and restarts: a ring is a queue, and nobody sleeps through work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from virtio.errors import RingFull
from virtio.split_ring import Chain, DeviceRing, DriverRing, layout_at

SIZE = 8
MEMORY_BYTES = 1 << 16
TABLES_AT = 0x8000  # one indirect table per head


@dataclass
class Offered:
    """What the driver added, as the model knows it."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    token: int | None
    descriptors: int


class RingMachine(RuleBasedStateMachine):
    """A driver and a device over one memory, against lists."""

    @initialize(event_idx=st.booleans(), start=st.sampled_from([0, 1, 0x7FFF, 0xFFF8, 0xFFFF]))
    def set_up(self, event_idx: bool, start: int) -> None:
        self.event_idx = event_idx
        self.memory = memoryview(bytearray(MEMORY_BYTES))
        self.layout = layout_at(0, SIZE)
        words = self.memory.cast("H")
        words[(self.layout.avail >> 1) + 1] = words[(self.layout.used >> 1) + 1] = start
        self.driver = DriverRing(self.memory, self.layout, event_idx=event_idx)
        self.driver.restore(self.driver.save() | {"avail": start, "seen": start})
        self.driver.enable_interrupts()
        self.device = DeviceRing(self.memory, self.layout, next_avail=start, event_idx=event_idx)
        self.added: list[Offered] = []  # not yet published
        self.available: list[Offered] = []
        self.held: list[Offered] = []  # popped
        self.pushed: list[tuple[Offered, int]] = []  # not yet published
        self.back: list[tuple[Offered, int]] = []
        self.tokens = 0
        self.device_asleep = self.device.pop_all() == []  # it looked, found nothing, and waits for a kick
        self.driver_asleep = True

    def everywhere(self) -> list[Offered]:
        back = [offered for offered, _ in self.pushed + self.back]
        return self.added + self.available + self.held + back

    @rule(readable=st.integers(0, 4), writable=st.integers(0, 4), indirect=st.booleans(), named=st.booleans())
    def add(self, readable: int, writable: int, indirect: bool, named: bool) -> None:
        count = readable + writable
        if count == 0:
            return
        buffers = [(0x4000 + 16 * index + self.tokens % 16, index + 1) for index in range(count)]
        self.tokens += 1
        token = self.tokens if named else None
        needed = 1 if indirect else count
        free = SIZE - sum(offered.descriptors for offered in self.everywhere())
        table = self.free_table() if indirect else None
        if needed > free:
            with pytest.raises(RingFull):
                self.driver.add(buffers[:readable], buffers[readable:], token, indirect_table=table)
            return
        head = self.driver.add(buffers[:readable], buffers[readable:], token, indirect_table=table)
        if table is not None:
            self.tables[head] = table
        self.added.append(Offered(head, buffers[:readable], buffers[readable:], token, needed))

    tables: dict[int, int]

    def free_table(self) -> int:
        self.tables = getattr(self, "tables", {})
        live = {self.tables.get(offered.head) for offered in self.everywhere()}
        return next(at for at in range(TABLES_AT, TABLES_AT + 0x1000, 0x100) if at not in live)

    @rule(count=st.integers(1, 10), reserve=st.integers(0, 2))
    def add_inbufs(self, count: int, reserve: int) -> None:
        free = SIZE - sum(offered.descriptors for offered in self.everywhere())
        addresses = np.arange(count, dtype=np.uint64) * 64 + self.tokens % 64
        self.tokens += 1
        before = {offered.head for offered in self.everywhere()}
        added = self.driver.add_inbufs(addresses, np.full(count, 7, np.uint32), reserve=reserve)
        assert added == max(0, min(count, free - reserve))
        self.tables = getattr(self, "tables", {})
        avail = self.memory[self.layout.avail + 4 :][: 2 * SIZE].cast("H")
        index = self.driver.save()["avail"]
        for position in range(added):
            head = avail[(index - added + position) % SIZE]
            assert head not in before
            self.tables.pop(head, None)
            self.added.append(Offered(head, [], [(int(addresses[position]), 7)], None, 1))

    @rule()
    def publish_available(self) -> None:
        kick = self.driver.publish()
        if self.added and (self.device_asleep or not self.event_idx):
            assert kick, "the device would sleep through this"
        self.device_asleep = self.device_asleep and not kick
        self.available += self.added
        self.added = []

    @rule()
    def pop(self) -> None:
        chain = self.device.pop()
        self.device_asleep = chain is None
        expected = self.available.pop(0) if self.available else None
        assert chain == (
            None if expected is None else Chain(expected.head, expected.readable, expected.writable)
        )
        if expected is not None:
            self.held.append(expected)

    @rule(chains_max=st.integers(1, 10))
    def pop_all(self, chains_max: int) -> None:
        chains = self.device.pop_all(chains_max)
        taken, self.available = self.available[:chains_max], self.available[chains_max:]
        assert chains == [Chain(offered.head, offered.readable, offered.writable) for offered in taken]
        self.device_asleep = len(chains) < chains_max
        self.held += taken
        assert self.device.take_errors() == []

    @precondition(lambda self: self.held)
    @rule(choice=st.randoms(use_true_random=False), written=st.integers(0, 2**32 - 1))
    def push(self, choice, written: int) -> None:
        offered = self.held.pop(choice.randrange(len(self.held)))
        self.device.push(offered.head, written)
        self.pushed.append((offered, written))

    @rule()
    def push_many(self) -> None:
        self.device.push_many([offered.head for offered in self.held])
        self.pushed += [(offered, 0) for offered in self.held]
        self.held = []

    @precondition(lambda self: self.held)
    @rule()
    def unpop_the_newest(self) -> None:
        newest = self.device.newest  # None after an unpop, until the next pop
        if newest is not None and len(self.available) < SIZE:
            assert self.held[-1].head == newest
            self.device.unpop(newest)
            self.available.insert(0, self.held.pop())
            self.device_asleep = False

    @rule()
    def publish_used(self) -> None:
        interrupt = self.device.publish()
        if self.pushed and self.driver_asleep:
            assert interrupt, "the driver would sleep through this"
        self.driver_asleep = self.driver_asleep and not interrupt
        self.back += self.pushed
        self.pushed = []

    @rule()
    def used(self) -> None:
        found = [(used.token, used.head, used.length) for used in self.driver.used()]
        assert found == [(offered.token, offered.head, written) for offered, written in self.back]
        self.back = []
        self.driver_asleep = not self.driver.enable_interrupts()

    @rule()
    def look_without_interrupts(self) -> None:
        self.driver.disable_interrupts()
        self.driver_asleep = False

    @rule()
    def move_the_driver(self) -> None:
        """Saved and restored, as after a migration: nothing is lost."""
        if self.added:
            return  # a driver publishes before it is saved
        saved = self.driver.save()
        self.driver = DriverRing(self.memory, self.layout, event_idx=self.event_idx)
        self.driver.restore(saved)

    @precondition(lambda self: not self.held and not self.pushed)
    @rule()
    def replace_the_device(self) -> None:
        base = self.device.next_avail
        self.device = DeviceRing(self.memory, self.layout, next_avail=base, event_idx=self.event_idx)
        self.device_asleep = False  # a new device looks before it sleeps

    @invariant()
    def descriptors_are_conserved(self) -> None:
        if hasattr(self, "driver"):
            taken = sum(offered.descriptors for offered in self.everywhere())
            assert self.driver.free_descriptors == SIZE - taken
            assert self.driver.in_flight == len(self.everywhere())
            assert self.device.in_flight == len(self.held)


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_ring_behaves_like_a_queue = RingMachine.TestCase
