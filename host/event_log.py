"""What happened on this node, in order, for whoever watches.

Rule 1: events are facts with a monotonic instant; units are in the keys; values are plain JSON.
Rule 2: a watcher gets everything since the start of the process, then what follows, until `close`.
Rule 3: the log is bounded: progress lines, the only frequent ones, end at a limit. It never fails its writer.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from host.clock import now_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRESS_EVENTS_MAX = 100_000  # some hours at ten a second; after that progress is left out, and nothing else


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
            if name != "progress" or len(self._facts) < PROGRESS_EVENTS_MAX:
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

    def wake(self) -> None:
        """Have every watch look whether it is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def watch(self, wanted: Callable[[], bool] = lambda: True) -> Iterator[NodeFact]:
        """Every fact from the first on; blocks for the next one; ends at `close`, or when not wanted any more."""
        position = 0
        while True:
            with self._changed:
                while len(self._facts) == position and not self._closed and wanted():
                    self._changed.wait()
                if len(self._facts) == position:
                    return
                fresh = self._facts[position:]
            yield from fresh
            position += len(fresh)
