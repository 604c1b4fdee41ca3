"""Free page hinting, the device's side (virtio 1.2 section 5.5.6.5): which hints count.

Rule 1: a hint counts only while the guest reports for the id we last issued: from its command with that id to
        its next command. All else is stale, is counted, and changes nothing.
Rule 2: an id is never issued again before the guest's STOP ended every earlier report.
Rule 3: only whole pages inside a hinted range count; a range outside RAM or without a whole page is rejected.
Rule 4: what one report may name is bounded (`FLOOD_FACTOR`): dropping a hint is always safe, keeping all is not.
Rule 5: nothing here knows which pages are to be sent or are dirty: a hint says "free since id n was
        issued", and only the set harvested before id n may be cleared by it. Whoever opens a session must
        have harvested, and must not harvest again before `close`.

    IDLE ──open──▶ REQUESTED ──guest: our id──▶ STARTED ──guest: anything else──▶ STOPPED ──open──▶ REQUESTED
                       └──────────close──────────────┴──close──▶ STOPPED       every state ──done──▶ DONE
                       ──open──▶
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from virtio.balloon import (
    CMD_ID_BYTES,
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_LAST,
    CMD_ID_STOP,
    PAGE_BYTES,
    PAGE_SHIFT,
    command_id_after,
)
from virtio.errors import LocalVirtioError

# A guest may report a range more than once (no walker promises otherwise); without an end it would fill our memory.
FLOOD_FACTOR = 4
_COMMAND = struct.Struct("<I")
assert _COMMAND.size == CMD_ID_BYTES


class HintState(Enum):
    """Where a hint session is."""

    IDLE = "idle"
    REQUESTED = "requested"
    STARTED = "started"
    STOPPED = "stopped"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class HintStarted:
    """The guest began to report for the current id."""

    command_id: int


@dataclass(frozen=True, slots=True)
class HintRange:
    """These whole pages were free at some time after the current id was issued."""

    pfn_first: int
    page_count: int


@dataclass(frozen=True, slots=True)
class HintStopped:
    """The guest ended its report for this id."""

    command_id: int


@dataclass(frozen=True, slots=True)
class StaleRange:
    """Whole pages hinted for another id than the current one, or for none: ignored."""

    pages: int


@dataclass(frozen=True, slots=True)
class StaleCommand:
    """A command of an older report, such as a late STOP: ignored."""

    command_id: int


@dataclass(frozen=True, slots=True)
class RejectedRange:
    """A range or a command that no guest may send: ignored."""

    reason: str


HintEvent = HintStarted | HintRange | HintStopped | StaleRange | StaleCommand | RejectedRange

# What each call may come from, and where it leads; `close` is legal everywhere (closing twice means nothing).
OPEN_FROM = frozenset({HintState.IDLE, HintState.STOPPED, HintState.DONE})
CLOSE_LEADS_TO = {
    HintState.IDLE: HintState.IDLE,
    HintState.REQUESTED: HintState.STOPPED,
    HintState.STARTED: HintState.STOPPED,
    HintState.STOPPED: HintState.STOPPED,
    HintState.DONE: HintState.DONE,
}


class HintSession:
    """The hint sessions of one device, one after the other.

    Attributes:
        state: see `HintState`.
        next_command_id: the id that `open` will issue; device state that migrates.
    """

    def __init__(self, next_command_id: int = CMD_ID_FIRST) -> None:
        """Sessions whose first id is `next_command_id` (2 or more).

        Raises LocalVirtioError for an id that must never be issued.
        """
        if not CMD_ID_DONE < next_command_id <= CMD_ID_LAST:
            raise LocalVirtioError(f"{next_command_id} is no command id")
        self.state = HintState.IDLE
        self.next_command_id = next_command_id
        self._current: int | None = None
        self._oldest_unended: int | None = None  # oldest id issued since the guest's last STOP
        self._stopped_by_guest = False
        self._hinted_pages = 0  # in the current report, duplicates included

    @property
    def config_command_id(self) -> int:
        """What the configuration space shows.

        A guest that stopped by itself still sees its id: showing STOP before the host closed would say that
        the host had asked for it.
        """
        if self.state is HintState.DONE:
            return CMD_ID_DONE
        if self._current is not None and (self.state is not HintState.STOPPED or self._stopped_by_guest):
            return self._current
        return CMD_ID_STOP

    @property
    def is_open(self) -> bool:
        """Whether the guest may still hint for the current id."""
        return self.state in (HintState.REQUESTED, HintState.STARTED)

    def open(self) -> int:
        """Ask the guest for a report: returns the new id, to be shown in the configuration space.

        Raises LocalVirtioError when a session is open, or when all 2**31 ids wait for the guest's STOP.
        """
        if self.state not in OPEN_FROM:
            raise LocalVirtioError(f"a hint session is {self.state.value} already")
        command_id = self.next_command_id
        if command_id == self._oldest_unended:
            raise LocalVirtioError(f"id {command_id:#x} was used and the guest never ended its report")
        if self._oldest_unended is None:
            self._oldest_unended = command_id
        self.next_command_id = command_id_after(command_id)
        self._current = command_id
        self._hinted_pages = 0
        self._stopped_by_guest = False
        self.state = HintState.REQUESTED
        return command_id

    def close(self) -> None:
        """End the session from our side: what comes for its id from now on is stale. Shows STOP."""
        self.state = CLOSE_LEADS_TO[self.state]
        self._stopped_by_guest = False

    def done(self) -> None:
        """Tell the guest that it may have its pages back: after migration, and after every failed one."""
        self.close()
        self.state = HintState.DONE

    def feed_command(self, data: bytes) -> HintEvent:
        """What the content of a device-readable buffer means."""
        if len(data) != CMD_ID_BYTES:
            return RejectedRange(f"a command of {len(data)} bytes")
        (command_id,) = _COMMAND.unpack(data)
        if self.state is HintState.REQUESTED and command_id == self._current:
            self.state = HintState.STARTED
            return HintStarted(command_id)
        if self.state is HintState.STARTED and command_id == self._current:
            return RejectedRange("an id sent twice")
        if self.state is HintState.STARTED:
            # STOP ends the report; so does any other id, as what follows is not for ours.
            assert self._current is not None
            self.state = HintState.STOPPED
            self._stopped_by_guest = True
            self._oldest_unended = None if command_id == CMD_ID_STOP else self._oldest_unended
            return HintStopped(self._current)
        if command_id == CMD_ID_STOP:
            # A late STOP: all reports but one that was asked for and has not begun are over.
            self._oldest_unended = self._current if self.state is HintState.REQUESTED else None
        return StaleCommand(command_id)

    def feed_range(
        self, address: int, length: int, pages: int, first_page: int = 0
    ) -> HintRange | StaleRange | RejectedRange:
        """What a device-writable buffer means: `length` bytes at guest address `address` are free.

        Guest RAM is the pages from `first_page` up to `pages`. Pages that the range covers only in part do not
        count, nor does anything once the report named all of RAM `FLOOD_FACTOR` times.
        """
        if length <= 0 or address < first_page * PAGE_BYTES or address + length > pages * PAGE_BYTES:
            return RejectedRange(f"{address:#x}+{length:#x} is not inside pages {first_page}..{pages}")
        first = (address + PAGE_BYTES - 1) >> PAGE_SHIFT
        count = ((address + length) >> PAGE_SHIFT) - first
        if count <= 0:
            return RejectedRange(f"{address:#x}+{length:#x} holds no whole page")
        if self.state is not HintState.STARTED:
            return StaleRange(count)
        if self._hinted_pages + count > FLOOD_FACTOR * (pages - first_page):
            return RejectedRange("a report of more pages than an honest guest has")
        self._hinted_pages += count
        return HintRange(first, count)
