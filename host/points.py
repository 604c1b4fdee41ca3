"""Points: named steps of the protocol at which a node can be held until somebody outside has done something.

Rule 1: nothing is held unless it was armed, and passing a point that is not armed costs one look at an empty set.
Rule 2: an armed point holds the thread that reaches it, once: until it is released, until its time is over, or
        until the node ends. Each of these is an event, so that a history says how long the node stood.
Rule 3: a point is reached where the table says: before a step is begun, or after what it does is done (durable,
        handed to gRPC, told to the guest). The commands are in source_node/reached.py and
        dest_node/reached.py.
Rule 4: "round N" is reached before the first page of round N goes out, "round N P%" once P percent of the round's
        pages are sent or skipped, at the latest when all are.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from host.event_log import EventLog

SOURCE_POINTS: Final = {
    "started.recorded": "the attempt is in the source's journal, the destination knows nothing of it",
    "open.sent": "the destination was asked for memory",
    "hint.open": "a command id was issued to the guest, no page of the round has gone out",
    "stop_copy": "the decision to stop the guest was made, it still runs",
    "last_harvest": "the guest stands still, what it wrote last was not read yet",
    "saved": "state and image digest are taken, the page streams are closed, Prepare was not sent",
    "prepare.sent": "Prepare was handed to the connection",
    "committing.recorded": "COMMITTING is durable, Commit was not sent: from here only the destination decides",
    "commit.sent": "Commit was handed to the connection",
    "completed.recorded": "the source knows that the guest was given away",
    "aborted.recorded": "the attempt is burned, the guest was not resumed yet",
}
DEST_POINTS: Final = {
    "receiving.recorded": "memory is reserved, Open was not answered",
    "prepare.received": "Prepare has come, nothing was verified",
    "prepared.recorded": "PREPARED is durable, Prepare was not answered",
    "commit.received": "Commit has come, the standby guest was not asked yet",
    "committed.recorded": "COMMITTED is durable, the guest does not run",
    "guest.run": "the guest runs at the destination, Commit was not answered",
}
HOLD_MS_DEFAULT: Final = 60_000  # longer than any fault's application, shorter than a forgotten test

_ROUND = re.compile(r"round (?P<index>[1-9]\d{0,3})(?: (?P<percent>\d{1,2}|100)%)?")


def round_point(point: str) -> tuple[int, int] | None:
    """(index, percent) of "round 2 50%", or None when it names no round."""
    match = _ROUND.fullmatch(point)
    return None if match is None else (int(match["index"]), int(match["percent"] or 0))


def side_of(point: str) -> str:
    """The role whose node reaches the point: "source" or "dest".

    Raises:
        ValueError: there is no such point.
    """
    if point in SOURCE_POINTS or round_point(point) is not None:
        return "source"
    if point in DEST_POINTS:
        return "dest"
    known = ", ".join(["round N", "round N P%", *SOURCE_POINTS, *DEST_POINTS])
    raise ValueError(f"there is no point {point!r}; known points: {known}")


class Points:
    """A node's points. Thread-safe; `reach` is called by the threads that carry commands out."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._armed: dict[str, int] = {}  # -> for how long it holds, in ms
        self._held: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False

    def arm(self, point: str, hold_ms_max: int = 0) -> None:
        """Hold whoever reaches `point` next, for `hold_ms_max` (0: a minute) at most.

        Raises:
            ValueError: there is no such point.
        """
        side_of(point)
        with self._changed:
            self._armed[point] = hold_ms_max or HOLD_MS_DEFAULT

    def release(self, point: str) -> bool:
        """Disarm the point and let whoever waits there go on; whether somebody did."""
        with self._changed:
            self._armed.pop(point, None)
            held = point in self._held
            self._held.discard(point)
            self._changed.notify_all()
        return held

    def close(self) -> None:
        """The node ends: nobody is held any more."""
        with self._changed:
            self._closed = True
            self._armed.clear()
            self._changed.notify_all()

    def reach(self, point: str) -> None:
        """The calling thread has come to `point`; returns when it may go on."""
        if self._armed and (hold_ms := self._take(point)) is not None:
            self._hold(point, hold_ms)

    def reach_round(self, index: int, done_percent: float) -> None:
        """As `reach`, for every armed point of round `index` that lies at or before `done_percent`."""
        if not self._armed:
            return
        for point in tuple(self._armed):
            at = round_point(point)
            if at is not None and at[0] == index and at[1] <= done_percent:
                self.reach(point)

    def _take(self, point: str) -> int | None:
        with self._changed:
            hold_ms = None if self._closed else self._armed.pop(point, None)
            if hold_ms is not None:
                self._held.add(point)
            return hold_ms

    def _hold(self, point: str, hold_ms: int) -> None:
        self._events.add("point_reached", point=point)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or point not in self._held, hold_ms / 1000)
            in_time = point not in self._held
            self._held.discard(point)
        why = (
            "released" if in_time else "the node ends" if self._closed else f"nobody came within {hold_ms} ms"
        )
        self._events.add("point_released", point=point, why=why)
