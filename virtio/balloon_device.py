"""What a balloon device makes of the chains of its queues (virtio 1.2 section 5.5.6); memory is not its job.

Rule 1: nothing a guest does raises here: what is wrong is counted by kind (`guest_errors`) and left out of
        the result. The caller gives every chain back with length 0: a balloon never writes into buffers.
Rule 2: results are sets of page runs: a page named twice counts once, and work is per buffer, not per page.
Rule 3: direction decides what a buffer is, never its length: readable is a command, statistics or an array of
        page frame numbers, writable is pages.
Rule 4: the hint session's id is what the configuration space shows; nobody else writes that field.
Rule 5: a skipped page reads as zero at the destination. So a guest whose free pages hold another value gets no
        hints, and pages it reports stay as they are (sections 5.5.6.6, 5.5.6.7). PAGE_POISON is offered always:
        it is the only way to hear of such a guest.
Rule 6: the poison value is the driver's until its first free page came; afterwards it stands (5.5.6.6).
"""

from __future__ import annotations

from collections import Counter
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
    F_HINT_WAIT_ON_ACK,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_SG,
    F_STATS_VQ,
    F_VERSION_1,
    U32_MAX,
    BalloonConfig,
    has,
    mask,
)
from virtio.balloon_stats import STATS_BYTES_MAX, GuestStatistics, decode_stats
from virtio.errors import GuestProtocolError, LocalVirtioError, RemoteVirtioError
from virtio.hint_session import HintEvent, HintSession, RejectedRange
from virtio.page_ranges import NO_PAGES, PageRuns, merged, runs_of_pfns, whole_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio.arrays import U32Array
    from virtio.split_ring import Buffer, Chain

FEATURES_SUPPORTED = mask(
    F_MUST_TELL_HOST,
    F_STATS_VQ,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_PAGE_POISON,
    F_REPORTING,
    F_HINT_WAIT_ON_ACK,
    F_SG,
    F_RING_INDIRECT_DESC,
    F_RING_EVENT_IDX,
    F_VERSION_1,
)
FEATURES_DEFAULT = FEATURES_SUPPORTED
PFN_BYTES = 4
PFNS_PER_CHAIN_MAX = (
    4096  # Linux and FreeBSD send 256 at a time, Windows 1024; more would let a guest hold us up
)


class DeviceState(TypedDict):
    """What a balloon device is, apart from its rings: travels with the guest."""

    features: int
    num_pages: int
    actual: int
    poison_value: int
    next_command_id: int
    hints_open: bool


class BalloonDevice:
    """One balloon device.

    Attributes:
        first_page, pages: guest RAM is the pages from `first_page` up to `pages`.
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
        """A device for `pages` of guest RAM. Raises LocalVirtioError for features it does not have."""
        if features_offered & ~FEATURES_SUPPORTED or not has(features_offered, F_VERSION_1):
            raise LocalVirtioError(f"features {features_offered:#x}, supported {FEATURES_SUPPORTED:#x}")
        self.first_page = 0
        self.pages = pages
        self.features_offered = features_offered
        self.features = 0
        self.config = BalloonConfig() if config is None else config
        self.hints = HintSession()
        self.guest_errors: Counter[str] = Counter()
        self._free_pages_came = False

    def negotiate(self, accepted: int) -> bool:
        """Take the driver's choice (section 3.1.1); false, and counted, when it is not one of ours."""
        if accepted & ~self.features_offered:
            self.guest_errors["features"] += 1
            return False
        self.features = accepted
        self._free_pages_came = False
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
        if offset == CONFIG_OFFSET_POISON and self._free_pages_came:
            changed = data != self.config.read(offset, len(data))
            self.guest_errors["poison_changed"] += changed
            return not changed
        self.config.write(offset, data)
        return True

    def set_num_pages(self, num_pages: int) -> None:
        """Ask for a balloon of this size; announce the configuration change afterwards."""
        if not 0 <= num_pages <= min(self.pages, U32_MAX):
            raise LocalVirtioError(f"{num_pages} pages of {self.pages}")
        self.config.num_pages = num_pages

    @property
    def poison(self) -> int:
        """What the guest's free pages hold, as far as it said so: 0 without PAGE_POISON."""
        return self.config.poison_val if has(self.features, F_PAGE_POISON) else 0

    @property
    def hints_refusal(self) -> str:
        """Why hinted pages must not be skipped, in one line; "" when they may."""
        if not has(self.features, F_FREE_PAGE_HINT):
            return "the guest's balloon driver did not accept free page hinting"
        if self.poison != 0:
            return (
                f"the guest's free pages hold the poison value {self.poison:#010x};"
                " a skipped page would read as zero at the destination"
            )
        return ""

    @property
    def hints_usable(self) -> bool:
        """Whether hinted pages may be skipped."""
        return not self.hints_refusal

    def open_hints(self) -> int:
        """Start a hint session: its id is in the configuration space now; announce the change.

        Raises LocalVirtioError when hints are not usable or a session is open.
        """
        if self.hints_refusal:
            raise LocalVirtioError(self.hints_refusal)
        return self.hints.open()

    def close_hints(self) -> None:
        """End the hint session (shows STOP); process the hint queue up to its end first."""
        self.hints.close()

    def hints_done(self) -> None:
        """Let the guest have its pages back (shows DONE). Also right when no session ever was."""
        self.hints.done()

    def process_inflate(self, chains: Sequence[Chain], read: Callable[[int, int], bytes]) -> PageRuns:
        """Pages that chains of the inflate queue give away: their content is of no more interest.

        A chain is an array of page frame numbers, or with F_SG the pages themselves. `read(guest address,
        bytes)` returns a copy of guest memory.
        """
        return self._ballooned(chains, read)

    def process_deflate(self, chains: Sequence[Chain], read: Callable[[int, int], bytes]) -> PageRuns:
        """Pages that chains of the deflate queue take back; as `process_inflate`."""
        return self._ballooned(chains, read)

    def process_report(self, chains: Sequence[Chain]) -> PageRuns:
        """Free pages that chains of the reporting queue name (section 5.5.6.7).

        Punch them unless `poison` is a value that a punched page would not read as.
        """
        self._free_pages_came |= bool(chains)
        pages: list[Buffer] = []
        for chain in chains:
            if chain.readable:
                self.guest_errors["direction"] += 1
            else:
                pages += chain.writable
        return self._runs_in(pages)

    def process_stats(self, chain: Chain, read: Callable[[int, int], bytes]) -> GuestStatistics | None:
        """The statistics in a chain of the stats queue (section 5.5.6.3); None when it is none."""
        if chain.writable:
            self.guest_errors["direction"] += 1
            return None
        data = b"".join(read(*buffer) for buffer in _cut(chain.readable, STATS_BYTES_MAX))
        statistics = decode_stats(data)
        if statistics.leftover_bytes or sum(length for _, length in chain.readable) > STATS_BYTES_MAX:
            self.guest_errors["stats_size"] += 1
        return statistics

    def process_hint(self, chain: Chain, read: Callable[[int, int], bytes]) -> list[HintEvent]:
        """A chain of the hint queue: its readable part is a command, its writable buffers are free pages."""
        self._free_pages_came = True
        events: list[HintEvent] = []
        if chain.readable:
            events.append(self._command(chain.readable, read))
        events += [
            self.hints.feed_range(address, length, self.pages, self.first_page)
            for address, length in chain.writable
        ]
        for event in events:
            if isinstance(event, RejectedRange):
                self.guest_errors["hint"] += 1
        return events

    def count_errors(self, errors: Sequence[RemoteVirtioError]) -> None:
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

        Raises RemoteVirtioError ("device_state") when a number is out of range or a feature is not offered
        here; the device is then unchanged.
        """
        words = (state["num_pages"], state["actual"], state["poison_value"], state["next_command_id"])
        if any(not 0 <= word <= U32_MAX for word in words) or state["num_pages"] > self.pages:
            raise RemoteVirtioError("device_state", f"{state}")
        if not CMD_ID_DONE < state["next_command_id"] <= CMD_ID_LAST:
            raise RemoteVirtioError("device_state", f"next command id {state['next_command_id']}")
        if state["features"] & ~self.features_offered or state["features"] < 0:
            raise RemoteVirtioError("device_state", f"features {state['features']:#x} are not offered here")
        self.features = state["features"]
        self.config.num_pages, self.config.actual = state["num_pages"], state["actual"]
        self.config.poison_val = state["poison_value"]
        self.hints = HintSession(state["next_command_id"])

    def _command(self, buffers: Sequence[Buffer], read: Callable[[int, int], bytes]) -> HintEvent:
        total = sum(length for _, length in buffers)
        if total != CMD_ID_BYTES:
            return RejectedRange(f"a command of {total} bytes")
        return self.hints.feed_command(b"".join(read(address, length) for address, length in buffers))

    def _ballooned(self, chains: Sequence[Chain], read: Callable[[int, int], bytes]) -> PageRuns:
        self._free_pages_came |= bool(chains)
        arrays: list[bytes] = []
        pages: list[Buffer] = []
        as_buffers = has(self.features, F_SG)
        for chain in chains:
            if not chain.writable:
                arrays += self._array(chain.readable, read)
            elif chain.readable or not as_buffers:
                self.guest_errors["direction"] += 1
            else:
                pages += chain.writable
        if not arrays:
            return self._runs_in(pages)
        by_number = self._named_in(np.frombuffer(b"".join(arrays), "<u4"))
        if not pages:
            return by_number
        by_buffer = self._runs_in(pages)
        return merged(
            np.concatenate((by_number.first, by_buffer.first)),
            np.concatenate((by_number.count, by_buffer.count)),
            by_number.rejected + by_buffer.rejected,
        )

    def _array(self, buffers: Sequence[Buffer], read: Callable[[int, int], bytes]) -> list[bytes]:
        """The pieces of one array of page frame numbers; nothing, unread, when it is none."""
        total = sum(length for _, length in buffers)
        if total == 0 or total % PFN_BYTES or total > PFN_BYTES * PFNS_PER_CHAIN_MAX:
            self.guest_errors["pfn_array_size"] += 1
            return []
        return [read(address, length) for address, length in buffers]

    def _named_in(self, named: U32Array) -> PageRuns:
        inside = named[(named >= self.first_page) & (named < self.pages)]
        rejected = len(named) - len(inside)
        if rejected:
            self.guest_errors["pfn_range"] += rejected
        return runs_of_pfns(inside, rejected)

    def _runs_in(self, buffers: Sequence[Buffer]) -> PageRuns:
        if not buffers:
            return NO_PAGES
        covered = whole_pages(buffers, self.first_page, self.pages)
        if covered.outside:
            self.guest_errors["page_range"] += covered.outside
        if covered.partial:
            self.guest_errors["partial_page"] += covered.partial
        return merged(covered.first, covered.count, covered.outside)


def _cut(buffers: Sequence[Buffer], bytes_max: int) -> list[Buffer]:
    """The first `bytes_max` bytes of what the buffers hold."""
    kept: list[Buffer] = []
    for address, length in buffers:
        if bytes_max <= 0:
            break
        kept.append((address, min(length, bytes_max)))
        bytes_max -= length
    return kept


def reader(memory: memoryview) -> Callable[[int, int], bytes]:
    """A `read(guest address, bytes)` over guest RAM; outside, GuestProtocolError ("address_range")."""

    def read(address: int, length: int) -> bytes:
        if address < 0 or length < 0 or address + length > len(memory):
            raise GuestProtocolError("address_range", f"{address:#x}+{length:#x}")
        return bytes(memory[address : address + length])

    return read
