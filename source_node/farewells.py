"""Destinations that have not heard yet how an attempt ended: told again and again, until they have.

Rule 1: what is told is final and recorded (ABORTED, COMPLETED), so telling it twice, late, or to a host that has
        forgotten the attempt changes nothing. Without it a destination that prepared an image, and was cut off
        then, would keep it, and its memory, until somebody came by.
Rule 2: the journal knows who has heard; a process that is started again goes on telling the others.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from host.errors import JournalConflict
from source_node.attempt_note import AttemptNote
from source_node.destination import Destination

if TYPE_CHECKING:
    from host.context import HostContext
    from host.journal import Entry
    from migration.identity import AttemptKey

PAUSE_S_FIRST = 0.5  # a host that was started again serves within a second or two
PAUSE_S_MAX = 15.0  # nobody waits for it but memory of the destination
UNTOLD = frozenset({"ABORTED", "COMPLETED"})


def mark(host: HostContext, key: AttemptKey, *, told: bool = False, heard: bool = False) -> None:
    """Write down who has learnt the outcome of an attempt that has one."""
    entry = host.journal.get(key, "source")
    if entry is not None and entry.state in UNTOLD:
        detail = AttemptNote.read(entry.detail).known(told=told, heard=heard).text
        host.journal.move(key, "source", {entry.state}, entry.state, detail=detail)


class Farewells:
    """Thread-safe. Its thread runs while there is somebody to tell."""

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Tell everybody who has not heard, in the background."""
        with self._lock:
            if self._stopping.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._main, name="farewells", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """The node ends; who has not heard is told by the next process."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _main(self) -> None:
        pause_s, first = PAUSE_S_FIRST, True
        while waiting := self._unheard():
            for entry in waiting:
                self._tell(entry, first=first)
            first = False
            if self._stopping.wait(pause_s if self._unheard() else 0.0):
                return
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    def _unheard(self) -> list[Entry]:
        entries = (entry for entry in self._host.journal.entries("source") if entry.state in UNTOLD)
        return [entry for entry in entries if not AttemptNote.read(entry.detail).heard]

    def _tell(self, entry: Entry, *, first: bool) -> None:
        note = AttemptNote.read(entry.detail)
        address, server_name = note.address
        peer = Destination(
            address, entry.key, lambda _: None, server_name=server_name, trust=self._host.trust
        )
        try:
            problem = peer.abort(note.reason) if entry.state == "ABORTED" else peer.forget()
        finally:
            peer.close()
        if not problem:
            try:
                mark(self._host, entry.key, heard=True)
            except JournalConflict:  # forgotten meanwhile: nobody needs to hear of it
                return
            self._host.events.add("outcome_heard", attempt=str(entry.key), state=entry.state)
        elif first:
            self._host.events.add(
                "abort_unheard" if entry.state == "ABORTED" else "forget_unheard",
                attempt=str(entry.key),
                reason=problem,
            )
