"""What happened on this node, in order, for whoever watches.

Rule 1: events are facts with a monotonic instant; units are in the keys; values are plain JSON.
Rule 2: a watcher gets everything since the start of the process, then what follows, until `close`.
Rule 3: the log is bounded. Progress lines are the only frequent ones, and they are limited at their source.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from host.clock import now_ns

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS_MAX = 100_000  # hours of progress at ten lines a second; beyond it something loops


@dataclass(frozen=True, slots=True)
class NodeFact:
    """One event as it is streamed and kept."""

    at_ns: int
    name: str
    fields_json: str


class EventLog:
    """Append-only and thread-safe."""

    def __init__(self, node: str) -> None:
        self._facts: list[NodeFact] = []
        self._changed = threading.Condition()
        self._closed = False
        self._log = structlog.get_logger().bind(node=node)

    def add(self, name: str, **fields: Any) -> NodeFact:
        """Append one fact, stamped now; it goes to the process log as well."""
        fact = NodeFact(now_ns(), name, json.dumps(fields, separators=(",", ":")))
        with self._changed:
            if len(self._facts) >= EVENTS_MAX:
                raise OverflowError(f"more than {EVENTS_MAX} events on one node; last was {name}")
            self._facts.append(fact)
            self._changed.notify_all()
        if name != "progress":
            self._log.info(name, **fields)
        return fact

    def close(self) -> None:
        """End every watch after the last event."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def watch(self) -> Iterator[NodeFact]:
        """Every fact from the first on; blocks for the next one, ends at `close`."""
        position = 0
        while True:
            with self._changed:
                while len(self._facts) == position and not self._closed:
                    self._changed.wait()
                if len(self._facts) == position:
                    return
                fresh = self._facts[position:]
            yield from fresh
            position += len(fresh)
