"""Free page hints, the merged Linux way: allocate the largest blocks, tell the host, hold them until DONE.

Rule 1: a report is the current id in an out-buffer, one in-buffer per held block, then STOP in an out-buffer.
        An id is sent once; a report that the host ends early still ends with STOP (virtio 1.2, 5.5.6.5.1).
Rule 2: hinted blocks stay held (kind HELD) until DONE: using them in mid-migration would dirty them. Under memory
        pressure they are given back at once, even if the host has not looked at them yet.
Rule 3: one descriptor is kept for the id: STOP can always be sent. Linux drops a block when the ring is full;
        here the report waits for room, for a bounded time: a dropped block is 4 MiB sent for nothing.
Rule 4: held blocks are found in the frame table, not in a list: a restored guest finds them again.
Rule 5: with HINT_WAIT_ON_ACK a held block stays held until the device used its buffer, also after DONE and under
        pressure; the frame table's index says which blocks the device still has.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from guest_agent.errors import RestoreError
from guest_agent.frames import OWNER_HINT, FrameKind
from virtio.balloon import CMD_ID_BYTES, CMD_ID_STOP

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.arrays import U64Array
    from guest_agent.buddy import BuddyAllocator
    from guest_agent.frames import FrameTable
    from guest_agent.ring_area import RingArea
    from virtio.split_ring import DriverRing

    # Of HintReport.before_kick: first pages, page counts, HintReport.give_back, and a question: has the device used
    # nothing since the id was offered?
    BeforeKick = Callable[[U64Array, U64Array, Callable[[int], int], Callable[[], bool]], None]

__all__ = ["HINT_ORDER", "HintReport", "Phase"]

HINT_ORDER = 10  # Linux hints MAX_ORDER blocks only: 4 MiB on x86
BLOCK_PAGES = 1 << HINT_ORDER
BLOCK_BYTES = BLOCK_PAGES << 12
BATCH_BLOCKS = 128  # per kick: the device works on one batch while the next is allocated
RESERVED_DESCRIPTORS = 1  # for STOP
ROOM_WAIT_S_MAX = 0.05  # a device that takes nothing for so long costs the rest of the report, not more
RELEASE_FILLED_PAGES = 16 * BLOCK_PAGES  # 64 MiB: some tens of milliseconds
GIVE_BACK_BLOCKS_MIN = 8  # 32 MiB: pressure that comes for one page will come for more
START_TOKEN, STOP_TOKEN = "start", "stop"
COMMAND_SLOTS = {START_TOKEN: 0, STOP_TOKEN: 1}
AT_DEVICE = 1 << 31  # in the index of a held block's head, beside its order


class Phase(StrEnum):
    """Where a report stands."""

    IDLE = "idle"  # none is open
    OPENING = "opening"  # the id is still to be sent
    SENDING = "sending"  # blocks are being hinted
    CLOSING = "closing"  # STOP is still to be sent


class HintReport:
    """One report at a time. All methods but `give_back` belong to whoever holds the balloon's lock.

    Attributes:
        before_kick: called when the first hints of a report are in the ring and the device was not kicked yet,
            neither for them nor for the id: what it does happens after the hint was given and before the device
            processed it. Experiments use it; None otherwise.
        wait_on_ack: rule 5.
    """

    def __init__(
        self,
        *,
        ring: DriverRing,
        area: RingArea,
        memory: memoryview,
        frames: FrameTable,
        buddy: BuddyAllocator,
        kick: Callable[[], None],
    ) -> None:
        self._ring = ring
        self._area = area
        self._memory = memory
        self._frames = frames
        self._buddy = buddy
        self._kick = kick
        self._phase = Phase.IDLE
        self._command_id = CMD_ID_STOP
        self._ended: int | None = None  # id of a report that came to its end and was not asked about yet
        self._commands_in_flight: set[str] = set()
        self._blocks_left = 0
        self._found_room = True
        self._release_owed = False  # DONE came, and blocks are still held
        self._releasing = False  # the next step gives some of them back
        self._used_before = 0  # the device's used index when the id was offered
        self.before_kick: BeforeKick | None = None
        self.wait_on_ack = False
        self.skipped_blocks = 0  # found no room in the ring; this driver waits for room instead

    @property
    def held_pages(self) -> int:
        """Pages hinted and held until DONE."""
        return int(self._held_heads().size) * BLOCK_PAGES

    @property
    def is_open(self) -> bool:
        """Whether a report is under way."""
        return self._phase is not Phase.IDLE

    @property
    def has_work(self) -> bool:
        """Whether `step` would get on now, without the device returning anything first."""
        return (self.is_open and self._found_room) or self._releasing

    def start(self, command_id: int) -> None:
        """Open a report under an id that was not reported yet."""
        assert not self.is_open, self._phase
        self._phase = Phase.OPENING
        self._release_owed = self._releasing = False
        self._command_id = command_id
        # Blocks given back under pressure may be hinted again, but a report must come to an end.
        self._blocks_left = 2 * (self._frames.pages >> HINT_ORDER)

    def end(self) -> None:
        """The host wants no more, or gives no room: go on to STOP. An id that was not sent needs none."""
        if self._phase is Phase.OPENING:
            self._finish()
        elif self._phase is Phase.SENDING:
            self._phase = Phase.CLOSING

    def take_ended(self) -> int | None:
        """The id of the report that ended since the last call, once its STOP is on the queue."""
        ended, self._ended = self._ended, None
        return ended

    def release(self) -> int:
        """DONE: give all held blocks back to the guest; number of pages now.

        The rest comes in later steps: blocks of rule 5, and of a guest that fills what it frees all but the first:
        memory is filled at some GiB a second, and whoever allocates or pauses the guest waits for it.
        """
        filled = self._buddy.poison is not None
        released = self.give_back(RELEASE_FILLED_PAGES if filled else self._frames.pages)
        self._release_owed = bool(self._held_heads().size)
        self._releasing = self._release_owed and released > 0
        return released

    def give_back(self, pages_wanted: int) -> int:
        """Give held blocks back, at least as many pages as wanted if there are so many; number of pages.

        Safe on any thread: it takes only the allocator's lock.
        """
        with self._buddy.lock:
            blocks = max(-(-pages_wanted // BLOCK_PAGES), GIVE_BACK_BLOCKS_MIN)
            heads = self._held_heads()
            if self.wait_on_ack:
                heads = heads[self._frames.index[heads.astype(np.int64)] & AT_DEVICE == 0]
            heads = heads[-blocks:]  # highest first: low memory is scarcer
            if heads.size:
                self._buddy.free_blocks(heads, HINT_ORDER)
            return int(heads.size) * BLOCK_PAGES

    def step(self) -> bool:
        """One bounded piece of the report; whether anything was sent or came back."""
        moved = self.settle()
        if self._releasing:
            moved = self.release() > 0 or moved
        match self._phase:
            case Phase.OPENING:
                self._found_room = self._send_command(START_TOKEN, self._command_id)
                if self._found_room:
                    self._phase = Phase.SENDING
            case Phase.SENDING:
                self._found_room = self._send_blocks()
            case Phase.CLOSING:
                self._found_room = self._send_command(STOP_TOKEN, CMD_ID_STOP)
                if self._found_room:
                    self._finish()
            case Phase.IDLE:
                self._found_room = False
        return moved or self._found_room

    def settle(self) -> bool:
        """Take back what the device used; whether it used anything."""
        used = self._ring.used()
        acknowledged = []
        for buffer in used:
            if isinstance(buffer.token, str):
                self._commands_in_flight.discard(buffer.token)
            elif self.wait_on_ack:
                acknowledged.append(self._ring.address_of(buffer.head) >> 12)
        if acknowledged:
            self._frames.index[acknowledged] &= ~np.uint32(AT_DEVICE)
            if self._release_owed:
                self.release()
        return bool(used)

    def save(self) -> dict[str, Any]:
        """What RAM does not say. A report under way ends here: the next host's device never saw it begin."""
        return {
            "commands_in_flight": sorted(self._commands_in_flight),
            "release_owed": self._release_owed,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `save` gave.

        Raises:
            RestoreError: the saved report is malformed.
        """
        in_flight, owed = saved.get("commands_in_flight"), saved.get("release_owed")
        if (
            not isinstance(in_flight, list)
            or not COMMAND_SLOTS.keys() >= set(map(str, in_flight))
            or not isinstance(owed, bool)
        ):
            raise RestoreError(f"saved hint report is malformed: {saved!r}"[:200])
        self._commands_in_flight, self._release_owed = set(in_flight), owed
        self._releasing = owed

    def _finish(self) -> None:
        self._phase, self._ended = Phase.IDLE, self._command_id

    def _held_heads(self) -> U64Array:
        """First pages of all held blocks, ascending: blocks of the largest order start at its multiples."""
        owners = self._frames.owner[::BLOCK_PAGES]
        return (np.flatnonzero(owners == OWNER_HINT) * BLOCK_PAGES).astype(np.uint64)

    def _send_command(self, token: str, value: int) -> bool:
        """Queue a command id; False when its buffer or the ring is still busy."""
        if token in self._commands_in_flight or self._ring.free_descriptors < 1:
            return False
        address = self._area.command_slot(COMMAND_SLOTS[token])
        self._memory[address : address + CMD_ID_BYTES] = value.to_bytes(CMD_ID_BYTES, "little")
        self._used_before = self._ring.device_base
        self._ring.add([(address, CMD_ID_BYTES)], [], token)
        self._commands_in_flight.add(token)
        self._publish(kick=token == STOP_TOKEN or self.before_kick is None)
        return True

    def _send_blocks(self) -> bool:
        """Allocate and queue one batch, or go on to STOP when there are no blocks; False: the ring is full."""
        room = min(self._ring.free_descriptors - RESERVED_DESCRIPTORS, BATCH_BLOCKS)
        if room <= 0:
            return False
        count = min(room, self._blocks_left)
        heads = self._buddy.alloc_blocks(HINT_ORDER, count, kind=FrameKind.HELD, owner=OWNER_HINT)
        if not heads.size:
            self._phase = Phase.CLOSING
            return True
        self._blocks_left -= int(heads.size)
        if self.wait_on_ack:
            self._frames.index[heads.astype(np.int64)] |= AT_DEVICE
        counts = np.full(heads.size, BLOCK_PAGES, dtype=np.uint64)
        added = self._offer(heads, counts)
        assert added == heads.size, (added, heads.size)
        self._let_go(heads, counts)
        return True

    def _offer(self, heads: U64Array, page_counts: U64Array) -> int:
        """Queue free blocks, as many as there is room for; how many."""
        lengths = (page_counts << np.uint64(12)).astype(np.uint32)
        added = self._ring.add_inbufs(heads << np.uint64(12), lengths, reserve=RESERVED_DESCRIPTORS)
        self._publish(kick=self.before_kick is None)
        return added

    def _let_go(self, heads: U64Array, page_counts: U64Array) -> None:
        """These blocks are in the ring: the device may look at them, after `before_kick` had its turn."""
        if self.before_kick is not None:
            self.before_kick(heads, page_counts, self.give_back, self._device_untouched)
            self._kick()

    def _device_untouched(self) -> bool:
        """Whether the device used nothing since the id was offered."""
        return self._ring.device_base == self._used_before

    def _publish(self, *, kick: bool = True) -> None:
        if self._ring.publish() and kick:
            self._kick()
