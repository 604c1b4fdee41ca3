"""The driver's side of a split virtqueue (virtio 1.2 section 2.7).

Rule 1: ring memory is written only through `memory`, the guest's registered mapping, so that dirty tracking
        sees every store.
Rule 2: construction writes nothing: a fresh ring lies in zeroed RAM (or call `format`), a restored one goes
        on from `restore`.
Rule 3: what is free and what is chained to what is known from private copies; the device can write neither.
Rule 4: descriptors are freed only by used entries. A used entry for a chain that is not in flight is the
        device's fault, and the ring is of no more use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from virtio.errors import (
    DeviceProtocolError,
    GuestProtocolError,
    LocalVirtioError,
    RemoteVirtioError,
    RingFull,
)
from virtio.ring_layout import (
    AVAIL_F_NO_INTERRUPT,
    CHAIN_BYTES_LIMIT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_F_NO_NOTIFY,
    Buffer,
    RingLayout,
    RingView,
    check_layout,
    need_event,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.arrays import U16Array, U32Array, U64Array

TOKEN_CHARACTERS_MAX = 64  # tokens are part of the saved state, which must stay small


class Used(NamedTuple):
    """A chain that the device gave back.

    Attributes:
        token: what was given to `add` (None from `add_inbufs`).
        head: what `add` returned.
        length: bytes the device says it wrote.
    """

    token: object
    head: int
    length: int


class DriverRing:
    """The driver's side of one split virtqueue in guest RAM."""

    def __init__(self, memory: memoryview, layout: RingLayout, *, event_idx: bool = False) -> None:
        """A ring whose memory is zero or will be `restore`d; nothing is written here.

        `memory` is all of guest RAM as writable bytes. Raises LocalVirtioError when the layout is not
        legal.
        """
        try:
            check_layout(layout, len(memory))
        except GuestProtocolError as error:
            raise LocalVirtioError(str(error)) from error
        self.layout = layout
        self._memory = memory
        self._view = RingView(memory, layout)
        self._event_idx = event_idx
        self._interrupts = True
        self._free: U16Array  # a stack; its top is at _free_count - 1
        self._free_count: int
        self._next: U16Array  # by descriptor: the next one of its chain
        self._counts: U16Array  # by head: ring descriptors of the chain, 0 when not in flight
        self._addresses: U64Array  # by head: the buffer of a chain of `add_inbufs`
        self._lengths: U32Array
        self._tokens: dict[int, object]  # by head, where not None
        self._avail: int  # next entry of the available ring to fill
        self._published: int  # the available index the device sees
        self._seen: int  # next entry of the used ring to look at
        self._forget()

    @property
    def size(self) -> int:
        """Entries of the ring."""
        return self.layout.size

    @property
    def free_descriptors(self) -> int:
        """Descriptors that are in no chain."""
        return self._free_count

    @property
    def in_flight(self) -> int:
        """Chains added and not yet seen used."""
        return int(np.count_nonzero(self._counts))

    @property
    def device_base(self) -> int:
        """The vring base to give a device after the last one vanished without telling where it was.

        That is the used index in RAM: right for devices that give chains back in order, as a balloon does; at
        worst a chain is processed twice, which for inflation, deflation and hints means nothing new.
        """
        return self._view.words[self._view.used_index_at]

    def format(self) -> None:
        """Zero the ring's indices and flags and forget every chain."""
        view = self._view
        for at in (view.avail_flags_at, view.avail_index_at, view.used_event_at):
            view.words[at] = 0
        for at in (view.used_flags_at, view.used_index_at, view.avail_event_at):
            view.words[at] = 0
        self._forget()

    def add(
        self,
        out: Sequence[Buffer],
        in_: Sequence[Buffer],
        token: object,
        *,
        indirect_table: int | None = None,
    ) -> int:
        """Offer one chain: buffers the device reads, then buffers it writes; returns its head.

        With `indirect_table` (guest address of 16 bytes per buffer, untouched until the chain comes back) the
        chain takes one descriptor of the ring. The device sees it after `publish`.

        Raises:
            RingFull: too few free descriptors; nothing was changed.
            LocalVirtioError: no buffer at all, more than the ring's size, or a length that is not allowed.
        """
        buffers = [*out, *in_]
        _check_buffers(buffers, self.size)
        count = len(buffers)
        needed = 1 if indirect_table is not None else count
        if needed > self._free_count:
            raise RingFull(f"{needed} descriptors wanted, {self._free_count} free")
        entries = np.zeros(count, DESCRIPTOR)
        entries["address"] = [address for address, _ in buffers]
        entries["length"] = [length for _, length in buffers]
        entries["flags"][len(out) :] |= DESC_F_WRITE
        entries["flags"][:-1] |= DESC_F_NEXT
        taken = self._take(needed)
        if indirect_table is None:
            entries["next"][:-1] = taken[1:]
            self._view.table[taken] = entries
            self._next[taken[:-1]] = taken[1:]
        else:
            entries["next"][:-1] = np.arange(1, count)
            length = DESCRIPTOR_BYTES * count
            self._memory[indirect_table : indirect_table + length] = entries.tobytes()
            self._view.table[taken[0]] = (indirect_table, length, DESC_F_INDIRECT, 0)
        head = int(taken[0])
        self._counts[head] = needed
        if token is not None:
            self._tokens[head] = token
        self._view.avail[self._avail & (self.size - 1)] = head
        self._avail = (self._avail + 1) & 0xFFFF
        return head

    def add_inbufs(self, addresses: U64Array, lengths: U32Array, *, reserve: int = 0) -> int:
        """Offer many chains of one device-writable buffer each, in order; returns how many fitted.

        `reserve` descriptors are left free (for the command id that must still follow). The tokens are None.
        Raises LocalVirtioError for a length of 0 or arrays of different lengths.
        """
        if len(addresses) != len(lengths) or not np.all(lengths):
            raise LocalVirtioError("every buffer needs an address and a length above 0")
        count = max(0, min(len(addresses), self._free_count - reserve))
        if count == 0:
            return 0
        heads = self._take(count)
        table = self._view.table
        table["address"][heads] = addresses[:count]
        table["length"][heads] = lengths[:count]
        table["flags"][heads] = DESC_F_WRITE
        self._addresses[heads] = addresses[:count]
        self._lengths[heads] = lengths[:count]
        self._counts[heads] = 1
        self._view.avail[(self._avail + np.arange(count)) & (self.size - 1)] = heads
        self._avail = (self._avail + count) & 0xFFFF
        return count

    def publish(self) -> bool:
        """Let the device see everything added; returns whether it wants a kick (section 2.7.13)."""
        if self._avail == self._published:
            return False
        view, old, new = self._view, self._published, self._avail
        view.words[view.avail_index_at] = new
        self._published = new
        if self._event_idx:
            return need_event(view.words[view.avail_event_at], new, old)
        return not view.words[view.used_flags_at] & USED_F_NO_NOTIFY

    def used(self) -> list[Used]:
        """The chains given back since the last call, in the device's order; their descriptors are free again.

        Raises DeviceProtocolError ("used_index", "used_head") when the device gave back what it did not have.
        """
        entries = self._take_used()
        tokens = self._tokens
        if not tokens:
            return [Used(None, head, length) for head, length in entries.tolist()]
        return [Used(tokens.pop(head, None), head, length) for head, length in entries.tolist()]

    def used_buffers(self) -> tuple[U64Array, U32Array]:
        """As `used`, for rings whose chains are one buffer each: (addresses, lengths) of what came back.

        They are our own copy: a device that writes into the table cannot put other pages in. Raises as `used`.
        """
        heads = self._take_used()[:, 0]
        for head in heads.tolist() if self._tokens else ():
            self._tokens.pop(head, None)
        return self._addresses[heads], self._lengths[heads]

    def buffers_in_flight(self) -> tuple[U64Array, U32Array]:
        """(addresses, lengths) of the chains that the device has, each of one buffer."""
        heads = np.flatnonzero(self._counts)
        return self._addresses[heads], self._lengths[heads]

    def discard_used(self) -> int:
        """As `used`, for callers who only want the room back: returns how many chains. Raises as `used`."""
        entries = self._take_used()
        if self._tokens:
            for head in entries[:, 0].tolist():
                self._tokens.pop(head, None)
        return len(entries)

    def address_of(self, head: int) -> int:
        """The buffer's address of a chain of `add_inbufs` that came back, until its descriptor is used again."""
        return int(self._addresses[head])

    def disable_interrupts(self) -> None:
        """Tell the device that we look by ourselves; a hint, it may interrupt all the same."""
        self._interrupts = False
        view = self._view
        if self._event_idx:
            view.words[view.used_event_at] = (self._seen - 1) & 0xFFFF  # an index the device has just passed
        else:
            view.words[view.avail_flags_at] = AVAIL_F_NO_INTERRUPT

    def enable_interrupts(self) -> bool:
        """Ask for an interrupt at the next used chain; true: some are there already, so look again."""
        self._interrupts = True
        view = self._view
        if self._event_idx:
            view.words[view.used_event_at] = self._seen
        else:
            view.words[view.avail_flags_at] = 0
        return bool(view.words[view.used_index_at] != self._seen)

    def save(self) -> dict[str, Any]:
        """What RAM does not say about this ring: small, of JSON types. RAM holds the rest.

        Raises LocalVirtioError when a token in flight is neither None nor a small int or str.
        """
        tokens = []
        for head, token in sorted(self._tokens.items()):
            small = type(token) is int or (isinstance(token, str) and len(token) <= TOKEN_CHARACTERS_MAX)
            if not small:
                raise LocalVirtioError(f"token of chain {head} cannot be saved: {token!r}"[:200])
            tokens.append([head, token])
        return {
            "size": self.size,
            "avail": self._avail,
            "seen": self._seen,
            "interrupts": self._interrupts,
            "heads": np.packbits(self._counts > 0, bitorder="little").tobytes().hex(),
            "tokens": tokens,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `save`d state and the descriptor table in RAM.

        Raises RemoteVirtioError ("ring_state") when the two do not fit together; the ring is then
        unchanged.
        """
        try:
            heads, tokens = self._parse(saved)
            counts, following, used_up = self._chains_in_table(heads)
        except (KeyError, TypeError, ValueError) as error:
            raise RemoteVirtioError("ring_state", str(error)[:200]) from error
        self._forget()
        self._avail = self._published = saved["avail"]
        self._seen = saved["seen"]
        self._interrupts = saved["interrupts"]
        self._counts, self._next, self._tokens = counts, following, tokens
        self._addresses = self._view.table["address"].astype(np.uint64)
        self._lengths = self._view.table["length"].astype(np.uint32)
        free = np.flatnonzero(~used_up)[::-1]
        self._free[: len(free)] = free
        self._free_count = len(free)

    def close(self) -> None:
        """Let go of the memory, so that its owner can unmap it; the ring is of no use afterwards."""
        self._view.close()
        self._memory = memoryview(bytearray())

    def _forget(self) -> None:
        size = self.size
        self._free = np.arange(size, dtype=np.uint16)[::-1].copy()
        self._free_count = size
        self._next = np.zeros(size, np.uint16)
        self._counts = np.zeros(size, np.uint16)
        self._addresses = np.zeros(size, np.uint64)
        self._lengths = np.zeros(size, np.uint32)
        self._tokens = {}
        self._avail = self._published = self._seen = 0

    def _take(self, count: int) -> U16Array:
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count][::-1].copy()

    def _take_used(self) -> U32Array:
        """New used entries, shape (n, 2: head, length), checked; frees their descriptors."""
        view = self._view
        index = view.words[view.used_index_at]
        fresh = (index - self._seen) & 0xFFFF
        if fresh > self.size:
            raise DeviceProtocolError("used_index", f"{fresh} new entries in a ring of {self.size}")
        entries: U32Array = view.used[(self._seen + np.arange(fresh)) & (self.size - 1)]
        if fresh:
            heads = entries[:, 0]
            if int(heads.max()) >= self.size or not self._counts[heads].all():
                raise DeviceProtocolError("used_head", "a chain that is not in flight came back")
            if int(np.bincount(heads).max()) > 1:
                raise DeviceProtocolError("used_head", "a chain came back twice")
            self._release(heads)
            self._seen = index
        if self._event_idx and self._interrupts:
            view.words[view.used_event_at] = self._seen
        return entries

    def _release(self, heads: U32Array) -> None:
        counts = self._counts[heads]
        single = heads[counts == 1]
        self._free[self._free_count : self._free_count + len(single)] = single
        self._free_count += len(single)
        for head, count in zip(heads[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
            index = head
            for _ in range(count):
                self._free[self._free_count] = index
                self._free_count += 1
                index = int(self._next[index])
        self._counts[heads] = 0

    def _parse(self, saved: dict[str, Any]) -> tuple[list[int], dict[int, object]]:
        if saved["size"] != self.size:
            raise ValueError(f"saved from a ring of {saved['size']} entries, not {self.size}")
        for name in ("avail", "seen"):
            if type(saved[name]) is not int or not 0 <= saved[name] <= 0xFFFF:
                raise ValueError(f"{name} is no 16-bit index")
        if not isinstance(saved["interrupts"], bool):
            raise TypeError("interrupts is no flag")
        bits = np.frombuffer(bytes.fromhex(saved["heads"]), np.uint8)
        if len(bits) != (self.size + 7) // 8:
            raise ValueError("heads has another size")
        heads = np.flatnonzero(np.unpackbits(bits, count=self.size, bitorder="little")).tolist()
        tokens: dict[int, object] = dict(saved["tokens"])
        if not tokens.keys() <= set(heads):
            raise ValueError("a token without its chain")
        return heads, tokens

    def _chains_in_table(
        self, heads: list[int]
    ) -> tuple[U16Array, U16Array, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Walk the saved chains in RAM: (descriptors by head, links, which descriptors are taken)."""
        table = self._view.table.copy()
        counts, following = np.zeros(self.size, np.uint16), table["next"].copy()
        used_up = np.zeros(self.size, np.bool_)
        for head in heads:
            index = head
            while True:
                if index >= self.size or used_up[index]:
                    raise ValueError(f"chain {head} leaves the table or meets another")
                used_up[index] = True
                counts[head] += 1
                flags = int(table["flags"][index])
                if flags & DESC_F_INDIRECT or not flags & DESC_F_NEXT:
                    break
                index = int(following[index])
        return counts, following, used_up


def _check_buffers(buffers: list[Buffer], size: int) -> None:
    if not 0 < len(buffers) <= size:
        raise LocalVirtioError(f"a chain of {len(buffers)} buffers in a ring of {size}")
    if any(length <= 0 for _, length in buffers) or sum(length for _, length in buffers) >= CHAIN_BYTES_LIMIT:
        raise LocalVirtioError("buffers must not be empty and a chain must stay below 4 GiB")
