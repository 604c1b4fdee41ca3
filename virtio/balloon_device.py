"""What a balloon device makes of the chains of its queues (virtio 1.2 section 5.5.6); memory is not its job.

Rule 1: nothing a guest does raises here: what is wrong is counted by kind (`guest_errors`) and left out of
        the result. The caller gives every chain back with length 0: a balloon never writes into buffers.
Rule 2: results are sets: a page named twice counts once.
Rule 3: direction decides what a buffer is, never its length: readable is a command or an array of page frame
        numbers, writable is pages.
Rule 4: the hint session's id is what the configuration space shows; nobody else writes that field.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from virtio.balloon import (
    CMD_ID_BYTES,
    CMD_ID_DONE,
    CMD_ID_LAST,
    CONFIG_OFFSET_ACTUAL,
    CONFIG_OFFSET_POISON,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_VERSION_1,
    U32_MAX,
    BalloonConfig,
    has,
    mask,
)
from virtio.errors import GuestProtocolError, LocalProtocolError, RemoteProtocolError
from virtio.hint_session import HintEvent, HintSession, RejectedRange

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio.arrays import U32Array
    from virtio.split_ring import Buffer, Chain

FEATURES_SUPPORTED = mask(
    F_MUST_TELL_HOST,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_PAGE_POISON,
    F_RING_INDIRECT_DESC,
    F_RING_EVENT_IDX,
    F_VERSION_1,
)
FEATURES_DEFAULT = FEATURES_SUPPORTED & ~mask(F_PAGE_POISON)
PFN_BYTES = 4
PFNS_PER_CHAIN_MAX = 65_536  # 256 KiB: 256 of Linux's arrays in one chain; more would let a guest hold us up


class DeviceState(TypedDict):
    """What a balloon device is, apart from its rings: travels with the guest."""

    features: int
    num_pages: int
    actual: int
    poison_value: int
    next_command_id: int
    hints_open: bool


@dataclass(frozen=True, slots=True, eq=False)
class Inflated:
    """Pages the guest gave away: their content is of no more interest.

    Attributes:
        pfns: sorted, distinct, inside RAM; dtype u32.
        rejected: entries that named no page of RAM.
    """

    pfns: U32Array
    rejected: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Deflated:
    """Pages the guest took back; fields as in `Inflated`."""

    pfns: U32Array
    rejected: int = 0


class BalloonDevice:
    """One balloon device.

    Attributes:
        pages: guest RAM in pages.
        features_offered: what the device can do.
        features: what the driver accepted; 0 before `negotiate`.
        config: the configuration space; `free_page_hint_cmd_id` follows the hint session.
        hints: the hint session.
        guest_errors: how often the guest broke which rule.
    """

    def __init__(
        self,
        pages: int,
        *,
        features_offered: int = FEATURES_DEFAULT,
        config: BalloonConfig | None = None,
    ) -> None:
        """A device for `pages` of guest RAM. Raises LocalProtocolError for features it does not have."""
        if features_offered & ~FEATURES_SUPPORTED or not has(features_offered, F_VERSION_1):
            raise LocalProtocolError(f"features {features_offered:#x}, supported {FEATURES_SUPPORTED:#x}")
        self.pages = pages
        self.features_offered = features_offered
        self.features = 0
        self.config = BalloonConfig() if config is None else config
        self.hints = HintSession()
        self.guest_errors: Counter[str] = Counter()

    def negotiate(self, accepted: int) -> bool:
        """Take the driver's choice (section 3.1.1); false, and counted, when it is not one of ours."""
        if accepted & ~self.features_offered:
            self.guest_errors["features"] += 1
            return False
        self.features = accepted
        return True

    def read_config(self) -> bytes:
        """The 16 bytes of the configuration space."""
        self.config.free_page_hint_cmd_id = self.hints.config_command_id
        return self.config.to_bytes()

    def write_config(self, offset: int, data: bytes) -> bool:
        """A write by the driver; false, and counted, where it may not write (section 5.5.4).

        `actual` is the driver's; so is `poison_val` once PAGE_POISON is negotiated.
        """
        writable = [CONFIG_OFFSET_ACTUAL]
        if has(self.features, F_PAGE_POISON):
            writable.append(CONFIG_OFFSET_POISON)
        if offset not in writable or len(data) != PFN_BYTES:
            self.guest_errors["config_write"] += 1
            return False
        self.config.write(offset, data)
        return True

    def set_num_pages(self, num_pages: int) -> None:
        """Ask for a balloon of this size; announce the configuration change afterwards."""
        if not 0 <= num_pages <= min(self.pages, U32_MAX):
            raise LocalProtocolError(f"{num_pages} pages of {self.pages}")
        self.config.num_pages = num_pages

    @property
    def hints_usable(self) -> bool:
        """Whether hinted pages may be skipped: hints are negotiated, and freed pages may read as zero.

        A guest that poisons freed pages expects to find the poison again; destination memory is zero.
        """
        poisoned = has(self.features, F_PAGE_POISON) and self.config.poison_val != 0
        return has(self.features, F_FREE_PAGE_HINT) and not poisoned

    def open_hints(self) -> int:
        """Start a hint session: its id is in the configuration space now; announce the change.

        Raises LocalProtocolError when hints are not usable or a session is open.
        """
        if not self.hints_usable:
            raise LocalProtocolError(
                "free page hints are not negotiated, or the guest poisons its free pages"
            )
        return self.hints.open()

    def close_hints(self) -> None:
        """End the hint session (shows STOP); process the hint queue up to its end first."""
        self.hints.close()

    def hints_done(self) -> None:
        """Let the guest have its pages back (shows DONE). Also right when no session ever was."""
        self.hints.done()

    def process_inflate(self, chain: Chain, read: Callable[[int, int], bytes]) -> Inflated:
        """A chain of the inflate queue. `read(guest address, bytes)` returns a copy of guest memory."""
        return Inflated(*self._pfns(chain, read))

    def process_deflate(self, chain: Chain, read: Callable[[int, int], bytes]) -> Deflated:
        """A chain of the deflate queue; as `process_inflate`."""
        return Deflated(*self._pfns(chain, read))

    def process_hint(self, chain: Chain, read: Callable[[int, int], bytes]) -> list[HintEvent]:
        """A chain of the hint queue: its readable part is a command, its writable buffers are free pages."""
        events: list[HintEvent] = []
        if chain.readable:
            events.append(self._command(chain.readable, read))
        events += [self.hints.feed_range(address, length, self.pages) for address, length in chain.writable]
        for event in events:
            if isinstance(event, RejectedRange):
                self.guest_errors["hint"] += 1
        return events

    def count_errors(self, errors: Sequence[RemoteProtocolError]) -> None:
        """Count what a ring found wrong (`DeviceRing.take_errors`)."""
        for error in errors:
            self.guest_errors[error.kind] += 1

    def save(self) -> DeviceState:
        """The device's state; the rings' bases come from the rings."""
        return DeviceState(
            features=self.features,
            num_pages=self.config.num_pages,
            actual=self.config.actual,
            poison_value=self.config.poison_val,
            next_command_id=self.hints.next_command_id,
            hints_open=self.hints.is_open,
        )

    def restore(self, state: DeviceState) -> None:
        """Become the device that was saved. Hints of a session that was open there are stale here.

        Raises RemoteProtocolError ("device_state") when a number is out of range or a feature is not offered
        here; the device is then unchanged.
        """
        words = (state["num_pages"], state["actual"], state["poison_value"], state["next_command_id"])
        if any(not 0 <= word <= U32_MAX for word in words) or state["num_pages"] > self.pages:
            raise RemoteProtocolError("device_state", f"{state}")
        if not CMD_ID_DONE < state["next_command_id"] <= CMD_ID_LAST:
            raise RemoteProtocolError("device_state", f"next command id {state['next_command_id']}")
        if state["features"] & ~self.features_offered or state["features"] < 0:
            raise RemoteProtocolError("device_state", f"features {state['features']:#x} are not offered here")
        self.features = state["features"]
        self.config.num_pages, self.config.actual = state["num_pages"], state["actual"]
        self.config.poison_val = state["poison_value"]
        self.hints = HintSession(state["next_command_id"])

    def _command(self, buffers: Sequence[Buffer], read: Callable[[int, int], bytes]) -> HintEvent:
        total = sum(length for _, length in buffers)
        if total != CMD_ID_BYTES:
            return RejectedRange(f"a command of {total} bytes")
        return self.hints.feed_command(b"".join(read(address, length) for address, length in buffers))

    def _pfns(self, chain: Chain, read: Callable[[int, int], bytes]) -> tuple[U32Array, int]:
        """The distinct page frame numbers a chain's readable buffers hold, sorted, and how many were none."""
        nothing = np.empty(0, np.uint32)
        total = sum(length for _, length in chain.readable)
        if chain.writable:
            return nothing, self._refuse("direction")
        if total == 0 or total % PFN_BYTES or total > PFN_BYTES * PFNS_PER_CHAIN_MAX:
            return nothing, self._refuse("pfn_array_size")
        named = np.frombuffer(b"".join(read(address, length) for address, length in chain.readable), "<u4")
        inside = named[named < self.pages]
        rejected = len(named) - len(inside)
        if rejected:
            self.guest_errors["pfn_range"] += rejected
        return np.unique(inside), rejected

    def _refuse(self, kind: str) -> int:
        self.guest_errors[kind] += 1
        return 0


def reader(memory: memoryview) -> Callable[[int, int], bytes]:
    """A `read(guest address, bytes)` over guest RAM; outside, GuestProtocolError ("address_range")."""

    def read(address: int, length: int) -> bytes:
        if address < 0 or length < 0 or address + length > len(memory):
            raise GuestProtocolError("address_range", f"{address:#x}+{length:#x}")
        return bytes(memory[address : address + length])

    return read
