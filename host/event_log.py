"""What happened on this node, in order, for whoever watches.

Rule 1: events are facts with a monotonic instant; units are in the keys; values are plain JSON.
Rule 2: a watcher gets everything since the start of the process, then what follows, until `close`.
Rule 3: the log is bounded: progress lines, the only frequent ones, end at a limit. It never fails its writer.
Rule 4: beyond the limit of all events, which only a peer's flood of calls reaches, the oldest are dropped, and a
        watcher that has not had them is told how many: what a run does next is always told.
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

EVENTS_MAX = 200_000  # about 100 MB; a migration of a thousand rounds tells some ten thousand
DROPPED = "events_dropped"


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
        self._dropped = 0  # the oldest, before the first in the list
        self._changed = threading.Condition()
        self._closed = False
        self._log = structlog.get_logger().bind(node=node)

    def add(self, name: str, **fields: Any) -> NodeFact:
        """Append one fact, stamped now; it goes to the process log as well."""
        fact = NodeFact(now_ns(), name, json.dumps(fields, separators=(",", ":")))
        with self._changed:
            if name != "progress" or len(self._facts) < PROGRESS_EVENTS_MAX:
                if len(self._facts) == EVENTS_MAX:
                    self._dropped += EVENTS_MAX // 4  # at once: shifting the list costs its length
                    del self._facts[: EVENTS_MAX // 4]
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
                while self._dropped + len(self._facts) == position and not self._closed and wanted():
                    self._changed.wait()  # ends: an event, close, or a watcher that went away
                if self._dropped + len(self._facts) == position:
                    return
                missed = max(self._dropped - position, 0)
                position += missed
                fresh = self._facts[position - self._dropped :]
                position += len(fresh)
            if missed:
                yield NodeFact(fresh[0].at_ns if fresh else now_ns(), DROPPED, json.dumps({"events": missed}))
            yield from fresh
