"""The one history of a run: what both nodes said and what the testbed did, as it happens.

Rule 1: an event is a fact with the time at which its origin saw it; it is on disk before anyone acts on it.
Rule 2: arrival order is the order of the file; readers sort by time (record/run_record.py).
Rule 3: whoever waits, waits for a fact in the history with a deadline, never for time to pass.
Rule 4: `record` may be called from any thread and from a signal handler.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from testbed.clock import now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

LOOK_AGAIN_S: Final = 0.2  # whether a process that should speak still lives

Origin: TypeAlias = Literal["source", "dest", "third", "testbed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One fact. `at_ns` is CLOCK_MONOTONIC of the machine; units of the fields are in their keys."""

    at_ns: int
    origin: Origin
    name: str
    fields: Mapping[str, Any]

    def to_dict(self) -> dict[str, object]:
        """The line of events.jsonl."""
        return {"at_ns": self.at_ns, "origin": self.origin, "name": self.name, "fields": dict(self.fields)}


class History:
    """Collects events, writes them to `path`, tells subscribers, and lets callers wait for one."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._events: list[Event] = []
        self._subscribers: list[Callable[[Event], None]] = []
        # A reentrant lock: a signal handler records into a history that its own thread may be waiting on.
        self._changed = threading.Condition(threading.RLock())

    def subscribe(self, subscriber: Callable[[Event], None]) -> None:
        """Calls `subscriber` with every later event, on the thread that records it."""
        self._subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Callable[[Event], None]) -> None:
        """Undoes `subscribe`."""
        self._subscribers.remove(subscriber)

    def note(self, name: str, **fields: Any) -> Event:
        """Adds something that the testbed itself did or saw, now."""
        return self.record("testbed", name, fields, now_ns())

    def record(self, origin: Origin, name: str, fields: Mapping[str, Any], at_ns: int) -> Event:
        """Adds an event that its origin saw at `at_ns`."""
        event = Event(at_ns, origin, name, fields)
        line = json.dumps(event.to_dict(), ensure_ascii=False) + "\n"
        with self._changed:
            os.write(self._fd, line.encode())
            self._events.append(event)
            self._changed.notify_all()
        for subscriber in tuple(self._subscribers):
            subscriber(event)
        return event

    def having(self, name: str) -> list[Event]:
        """All events of this name so far."""
        with self._changed:
            return [event for event in self._events if event.name == name]

    def first(self, matches: Callable[[Event], bool]) -> Event | None:
        """The earliest-arrived event that matches."""
        with self._changed:
            return next((event for event in self._events if matches(event)), None)

    def wait_for(self, matches: Callable[[Event], bool], timeout_s: float) -> Event | None:
        """The first event that matches, past or future; None when the deadline passes without one."""
        seen = 0
        deadline_ns = now_ns() + int(timeout_s * 1e9)
        with self._changed:
            while True:
                fresh = self._events[seen:]
                seen += len(fresh)
                found = next((event for event in fresh if matches(event)), None)
                left_s = (deadline_ns - now_ns()) / 1e9
                if found is not None or left_s <= 0:
                    return found
                # Bounded: a signal handler of this very thread may record between the look and the wait.
                self._changed.wait(min(left_s, LOOK_AGAIN_S))

    def close(self) -> None:
        """Ends the file; later events are an error of the caller."""
        os.close(self._fd)
