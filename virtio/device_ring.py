"""The device's side of a split virtqueue (virtio 1.2 section 2.7), written for guests that lie.

Rule 1: a descriptor is read once, into private memory, and only what was checked is used.
Rule 2: a bad chain is given back used with length 0 and reported; a ring whose *index* or *head* is bad has
        no chain to give back, so it is broken and stays broken until it is set up again.
Rule 3: no walk is longer than the queue, no call takes more chains than asked or walks much more than
        `WALK_MAX` descriptors: a guest cannot make us spin.
Rule 4: a chain is written back only if it is in flight; anything else is our own mistake.
Rule 5: every store into guest memory is logged after it was made (`take_stores`): the guest's kernel cannot
        see what a device writes through its own mapping.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from virtio.errors import GuestProtocolError, LocalVirtioError
from virtio.ring_layout import (
    AVAIL_F_NO_INTERRUPT,
    CHAIN_BYTES_LIMIT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESCRIPTOR_BYTES,
    USED_ELEMENT_BYTES,
    Buffer,
    RingLayout,
    RingView,
    check_layout,
    need_event,
    used_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.arrays import U16Array

WALK_MAX = (
    8192  # descriptors per `pop_all`, about 10 ms; chains may share descriptors, so size**2 is possible
)
STORES_MAX = 4096  # undrained log entries; beyond it the log is one range covering the whole used ring
ERRORS_MAX = 256  # undrained errors kept in full; a flood of bad chains must not become our memory
_DESCRIPTOR = struct.Struct("<QIHH")
assert _DESCRIPTOR.size == DESCRIPTOR_BYTES


class Chain(NamedTuple):
    """One chain of buffers as the driver offered it: every buffer lies inside guest RAM, none is empty.

    Attributes:
        head: number to give back with `DeviceRing.push`.
        readable: buffers for the device to read, in order.
        writable: buffers for the device to write, in order.
    """

    head: int
    readable: list[Buffer]
    writable: list[Buffer]


class DeviceRing:
    """The device's side of one split virtqueue in guest RAM.

    Attributes:
        next_avail: the next entry of the available ring to look at: the vring base of vhost-user.
        broken: why the ring is of no more use, or None.
        errors_count: bad chains seen so far, including those dropped from the error log.
    """

    def __init__(
        self,
        memory: memoryview,
        layout: RingLayout,
        *,
        next_avail: int = 0,
        event_idx: bool = False,
        indirect: bool = True,
        first_address: int = 0,
    ) -> None:
        """Take a ring over at `next_avail`; the used index is the one in guest memory.

        `memory` is writable bytes; guest RAM is what of it lies at `first_address` and above.
        Raises GuestProtocolError ("ring_layout") when the layout is not legal for it.
        """
        check_layout(layout, len(memory), first_address)
        self.layout = layout
        self.next_avail = next_avail & 0xFFFF
        self.broken: GuestProtocolError | None = None
        self.errors_count = 0
        self._memory = memory
        self._first_address = first_address
        self._view = RingView(memory, layout)
        self._event_idx = event_idx
        self._indirect = indirect
        self._used = self._published = self._view.words[self._view.used_index_at]
        self._in_flight = np.zeros(layout.size, np.bool_)
        self._stores: list[tuple[int, int]] = []
        self._errors: list[GuestProtocolError] = []
        self._newest: int | None = None  # head of the newest chain taken
        self._walked = 0  # descriptors that the current `pop_all` followed one by one
        self._readable = 0  # bytes for the device to read in the chains of the current `pop_all`

    @property
    def size(self) -> int:
        """Entries of the ring."""
        return self.layout.size

    @property
    def in_flight(self) -> int:
        """Chains taken and not yet pushed."""
        return int(np.count_nonzero(self._in_flight))

    @property
    def newest(self) -> int | None:
        """Head of the chain that `unpop` would take back, None when there is none."""
        return self._newest if self._newest is not None and self._in_flight[self._newest] else None

    def pop(self) -> Chain | None:
        """The next chain, or None when there is none.

        Raises GuestProtocolError. If `broken` is None afterwards, the bad chain was given back used (publish
        tells the guest) and the next call goes on with the next chain.
        """
        if self.broken is not None:
            raise GuestProtocolError(self.broken.kind, f"ring is broken: {self.broken.detail}")
        return self._pop_one() if self._waiting() else None

    def pop_all(
        self, chains_max: int | None = None, *, readable_bytes_max: int = CHAIN_BYTES_LIMIT
    ) -> list[Chain]:
        """At most `chains_max` (default: the ring's size) chains; never raises for what the guest did.

        No more chains are taken once they hold `readable_bytes_max` bytes to read (the last one may exceed it).
        Bad chains are given back used, and their errors wait in `take_errors`, as does the error of a ring
        that broke. There may be more chains afterwards, unless neither chains nor errors came. 1024 chains of
        one descriptor take about a millisecond, other chains some microseconds per descriptor.
        """
        limit = self.size if chains_max is None else chains_max
        chains: list[Chain] = []
        seen = self._walked = self._readable = 0
        while (
            seen < limit
            and self._walked < WALK_MAX
            and self._readable < readable_bytes_max
            and self.broken is None
        ):
            try:
                count = min(self._waiting(), limit - seen)
            except GuestProtocolError as error:
                self._note(error)
                break
            if count == 0:
                break
            before = self.next_avail
            batch = self._pop_simple(count, readable_bytes_max)
            chains += self._pop_each(count, readable_bytes_max) if batch is None else batch
            seen += (self.next_avail - before) & 0xFFFF
        return chains

    def push(self, head: int, written_bytes: int = 0) -> None:
        """Give a chain back, with the number of bytes written into it. The guest sees it after `publish`.

        Raises LocalVirtioError when the chain is not in flight or the length has no 32 bits.
        """
        if not 0 <= head < self.size or not self._in_flight[head]:
            raise LocalVirtioError(f"chain {head} is not in flight")
        if not 0 <= written_bytes < CHAIN_BYTES_LIMIT:
            raise LocalVirtioError(f"{written_bytes} bytes written")
        self._in_flight[head] = False
        self._put_used(head, written_bytes)

    def push_many(self, heads: Sequence[int] | U16Array) -> None:
        """Give many chains back with nothing written: the fast path of `push`. Raises as `push`."""
        batch = np.asarray(heads, dtype=np.int64)
        if batch.size == 0:
            return
        if batch.min() < 0 or batch.max() >= self.size or not self._in_flight[batch].all():
            raise LocalVirtioError("a chain is not in flight")
        self._in_flight[batch] = False
        if np.count_nonzero(np.bincount(batch)) != batch.size:
            raise LocalVirtioError("a chain is given back twice")
        slots = (self._used + np.arange(batch.size)) & (self.size - 1)
        self._view.used[slots, 0] = batch
        self._view.used[slots, 1] = 0
        self._used = (self._used + batch.size) & 0xFFFF
        first, last = int(slots[0]), int(slots[-1])
        if last - first + 1 == batch.size:
            self._log_elements(first, batch.size)
        else:
            self._log_elements(first, self.size - first)
            self._log_elements(0, last + 1)

    def unpop(self, head: int) -> None:
        """Take back the newest `pop`: the chain will be popped again, here or by whoever takes the ring over.

        For chains a device holds for long (statistics) when the ring is stopped. Raises LocalVirtioError
        unless `head` is the newest chain taken and still in flight.
        """
        # Known from here and not from the available ring, which the guest may have overwritten since.
        if head != self.newest:
            raise LocalVirtioError(f"chain {head} is not the newest in flight")
        self._in_flight[head] = False
        self._newest = None
        self.next_avail = (self.next_avail - 1) & 0xFFFF

    def publish(self) -> bool:
        """Let the guest see everything pushed; returns whether it wants an interrupt (section 2.7.10)."""
        if self._used == self._published:
            return False
        view, old, new = self._view, self._published, self._used
        view.words[view.used_index_at] = new
        self._log(2 * view.used_index_at, 2)
        self._published = new
        if self._event_idx:
            return need_event(view.words[view.used_event_at], new, old)
        return not view.words[view.avail_flags_at] & AVAIL_F_NO_INTERRUPT

    def take_stores(self) -> list[tuple[int, int]]:
        """The (guest address, bytes) of every store since the last call: the device's own dirty log."""
        stores, self._stores = self._stores, []
        return stores

    def take_errors(self) -> list[GuestProtocolError]:
        """What `pop_all` found wrong since the last call (at most 256 kept; `errors_count` counts all)."""
        errors, self._errors = self._errors, []
        return errors

    def close(self) -> None:
        """Let go of the memory, so that its owner can unmap it; the ring is of no use afterwards."""
        self._view.close()
        self._memory = memoryview(bytearray())
        self.broken = GuestProtocolError("ring_closed")

    def _waiting(self) -> int:
        """Entries the driver made available and we have not taken; breaks the ring when that cannot be."""
        view = self._view
        waiting = (view.words[view.avail_index_at] - self.next_avail) & 0xFFFF
        if waiting == 0 and self._event_idx and view.words[view.avail_event_at] != self.next_avail:
            # Ask for a kick, then look again: the driver may have published between our read and this store.
            view.words[view.avail_event_at] = self.next_avail
            self._log(2 * view.avail_event_at, 2)
            waiting = (view.words[view.avail_index_at] - self.next_avail) & 0xFFFF
        if waiting > self.size:
            raise self._break("avail_index", f"{waiting} entries available in a ring of {self.size}")
        return waiting

    def _pop_simple(self, count: int, readable_bytes_max: int) -> list[Chain] | None:
        """Up to `count` chains at once if each is one good direct descriptor; else None and nothing happened."""
        view = self._view
        heads = view.avail[(self.next_avail + np.arange(count)) & (self.size - 1)]
        if int(heads.max()) >= self.size or self._in_flight[heads].any():
            return None
        if count > 1 and int(np.bincount(heads).max()) > 1:
            return None
        descriptors = view.table[heads]
        lengths, flags = descriptors["length"], descriptors["flags"]
        room = np.uint64(len(self._memory)) - lengths.astype(
            np.uint64
        )  # wraps only where the next line refuses
        simple = (flags & (DESC_F_NEXT | DESC_F_INDIRECT) == 0) & (lengths > 0)
        simple &= (lengths <= len(self._memory)) & (descriptors["address"] <= room)
        simple &= descriptors["address"] >= self._first_address
        if not simple.all():
            return None
        read = self._readable + np.cumsum(np.where(flags & DESC_F_WRITE, 0, lengths), dtype=np.uint64)
        count = min(count, 1 + int(np.searchsorted(read, readable_bytes_max)))
        heads, lengths, flags = heads[:count], lengths[:count], flags[:count]
        self._readable = int(read[count - 1])
        self._in_flight[heads] = True
        self._newest = int(heads[-1])
        self.next_avail = (self.next_avail + count) & 0xFFFF
        buffers = zip(descriptors["address"][:count].tolist(), lengths.tolist(), strict=True)
        return [
            Chain(head, [], [buffer]) if flag & DESC_F_WRITE else Chain(head, [buffer], [])
            for head, flag, buffer in zip(heads.tolist(), flags.tolist(), buffers, strict=True)
        ]

    def _pop_each(self, count: int, readable_bytes_max: int) -> list[Chain]:
        """The good ones of the next `count` chains, one by one, as far as the limits reach."""
        chains: list[Chain] = []
        for _ in range(count):
            try:
                chain = self._pop_one()
            except GuestProtocolError as error:
                self._note(error)
            else:
                chains.append(chain)
                self._readable += sum(length for _, length in chain.readable)
            if self._walked >= WALK_MAX or self._readable >= readable_bytes_max or self.broken is not None:
                break
        return chains

    def _pop_one(self) -> Chain:
        """The next chain, descriptor by descriptor; the caller saw that there is one."""
        head = int(self._view.avail[self.next_avail & (self.size - 1)])
        if head >= self.size:
            raise self._break("head_range", f"head {head} in a ring of {self.size}")
        if self._in_flight[head]:
            raise self._break("head_in_flight", f"head {head} was made available twice")
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        try:
            chain = self._walk(head)
        except GuestProtocolError:
            self._newest = None
            self._put_used(head, 0)
            raise
        self._in_flight[head] = True
        self._newest = head
        return chain

    def _walk(self, head: int) -> Chain:
        """Follow a chain from its head through at most one indirect table (sections 2.7.5, 2.7.5.3)."""
        chain = Chain(head, [], [])
        table, entries, index, steps = self.layout.desc, self.size, head, 0
        indirect, total_bytes, count = False, 0, 0
        while True:
            if steps == entries:
                raise GuestProtocolError("chain_loop", f"head {head}: more than {entries} steps")
            address, length, flags, following = _DESCRIPTOR.unpack_from(
                self._memory, table + DESCRIPTOR_BYTES * index
            )
            steps += 1
            self._walked += 1
            if flags & DESC_F_INDIRECT:
                if indirect:
                    raise GuestProtocolError("indirect_nested", f"head {head}")
                table, entries, index, steps = *self._indirect_table(head, address, length, flags), 0, 0
                indirect = True
                continue
            count += 1
            if count > self.size:
                raise GuestProtocolError(
                    "chain_length", f"head {head}: more buffers than the ring has entries"
                )
            total_bytes += length
            self._add_buffer(chain, address, length, flags, total_bytes)
            if not flags & DESC_F_NEXT:
                return chain
            if following >= entries:
                raise GuestProtocolError("next_range", f"head {head}: next {following} of {entries}")
            index = following

    def _indirect_table(self, head: int, address: int, length: int, flags: int) -> tuple[int, int]:
        """Check a descriptor that refers to an indirect table; returns the table's (address, entries)."""
        if not self._indirect:
            raise GuestProtocolError("indirect_not_negotiated", f"head {head}")
        if flags & DESC_F_NEXT:
            raise GuestProtocolError("indirect_next", f"head {head}: an indirect descriptor has a next one")
        if length == 0 or length % DESCRIPTOR_BYTES:
            raise GuestProtocolError("indirect_size", f"head {head}: table of {length} bytes")
        if not self._first_address <= address <= len(self._memory) - length:
            raise GuestProtocolError("address_range", f"head {head}: table at {address:#x}+{length:#x}")
        return address, length // DESCRIPTOR_BYTES

    def _add_buffer(self, chain: Chain, address: int, length: int, flags: int, total_bytes: int) -> None:
        if length == 0:
            raise GuestProtocolError("length_zero", f"head {chain.head}")
        # Also what would wrap around 2**64.
        if not self._first_address <= address <= len(self._memory) - length:
            raise GuestProtocolError("address_range", f"head {chain.head}: {address:#x}+{length:#x}")
        if total_bytes >= CHAIN_BYTES_LIMIT:
            raise GuestProtocolError("chain_bytes", f"head {chain.head}: {total_bytes} bytes")
        if flags & DESC_F_WRITE:
            chain.writable.append((address, length))
        elif chain.writable:
            raise GuestProtocolError(
                "direction", f"head {chain.head}: a readable buffer after a writable one"
            )
        else:
            chain.readable.append((address, length))

    def _put_used(self, head: int, written_bytes: int) -> None:
        slot = self._used & (self.size - 1)
        self._view.used[slot] = head, written_bytes
        self._used = (self._used + 1) & 0xFFFF
        self._log_elements(slot, 1)

    def _break(self, kind: str, detail: str) -> GuestProtocolError:
        self.broken = GuestProtocolError(kind, detail)
        return GuestProtocolError(kind, detail)

    def _note(self, error: GuestProtocolError) -> None:
        self.errors_count += 1
        if len(self._errors) < ERRORS_MAX:
            self._errors.append(error)

    def _log_elements(self, slot: int, count: int) -> None:
        self._log(self.layout.used + 4 + USED_ELEMENT_BYTES * slot, USED_ELEMENT_BYTES * count)

    def _log(self, address: int, length: int) -> None:
        if len(self._stores) >= STORES_MAX:
            self._stores = [(self.layout.used, used_bytes(self.size))]
        self._stores.append((address, length))
