"""Destinations that have not heard yet how an attempt ended: told again and again, until they have.

Rule 1: what is told is final and recorded (ABORTED, COMPLETED), so telling it twice, late, or to a host that has
        forgotten the attempt changes nothing. Without it a destination that prepared an image, and was cut off
        then, would keep it, and its memory, until somebody came by.
Rule 2: the journal knows who has heard; a process that is started again goes on telling the others. Only the
        destination's answer ends it: one that was unreachable may still hold what it prepared.
Rule 3: it is bounded: the newest UNHEARD_MAX attempts; a destination that does not answer costs one call a time.
Rule 4: before an attempt opens a destination, that destination is told: one that holds an image of an attempt which
        ended would refuse the next.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from host.errors import JournalConflict
from source_node.attempt_note import AttemptNote
from source_node.destination import Destination

if TYPE_CHECKING:
    from collections.abc import Iterable

    from host.context import HostContext
    from host.journal import Entry
    from migration.identity import AttemptKey

PAUSE_S_FIRST = 0.5  # a host that was started again serves within a second or two
PAUSE_S_MAX = 15.0  # nobody waits for it but memory of the destination
UNHEARD_MAX = 64  # an attempt holds memory of its destination only, and a destination has one at a time
UNTOLD = frozenset({"ABORTED", "COMPLETED"})


def mark(host: HostContext, key: AttemptKey, *, told: bool = False, heard: bool = False) -> None:
    """Write down who has learnt the outcome of an attempt that has one."""
    entry = host.journal.get(key, "source")
    if entry is not None and entry.state in UNTOLD:
        detail = AttemptNote.read(entry.detail).known(told=told, heard=heard).text
        host.journal.move(key, "source", {entry.state}, entry.state, detail=detail)


def unheard(host: HostContext, peer: str | None = None) -> list[Entry]:
    """The attempts whose destination, this one if given, has not heard how they ended; oldest first, bounded."""
    entries = [
        entry
        for entry in host.journal.entries("source")
        if entry.state in UNTOLD and not AttemptNote.read(entry.detail).heard
    ]
    return [entry for entry in entries[-UNHEARD_MAX:] if peer in (None, AttemptNote.read(entry.detail).peer)]


def tell_all(host: HostContext, entries: Iterable[Entry]) -> list[tuple[Entry, str]]:
    """Tell each entry's destination once; those that are not heard, with the reason.

    A destination that does not answer costs one call, not one per attempt.
    """
    silent: dict[str, str] = {}
    failed: list[tuple[Entry, str]] = []
    for entry in entries:
        note = AttemptNote.read(entry.detail)
        problem = silent.get(note.peer) or _tell(host, entry, note)
        if problem:
            silent[note.peer] = problem
            failed.append((entry, problem))
    return failed


def _tell(host: HostContext, entry: Entry, note: AttemptNote) -> str:
    """What went wrong, or ""."""
    address, server_name = note.address
    peer = Destination(address, entry.key, lambda _: None, server_name=server_name, trust=host.trust)
    try:
        problem = peer.abort(note.reason) if entry.state == "ABORTED" else peer.forget()
    finally:
        peer.close()
    if problem:
        return problem
    try:
        mark(host, entry.key, heard=True)
    except JournalConflict:  # forgotten meanwhile: nobody needs to hear of it
        return ""
    host.events.add("outcome_heard", attempt=str(entry.key), state=entry.state)
    return ""


class Farewells:
    """Thread-safe. Its thread runs while there is somebody to tell."""

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._news = threading.Event()  # somebody more is to be told, or the node ends
        self._stopping = False
        self._thread: threading.Thread | None = None  # None once it has found nobody to tell

    def begin(self) -> None:
        """Tell everybody who has not heard, in the background."""
        with self._lock:
            if self._stopping:
                return
            self._news.set()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._main, name="farewells", daemon=True)
                self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """The node ends; who has not heard is told by the next process."""
        with self._lock:
            self._stopping = True
            self._news.set()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _main(self) -> None:
        pause_s = PAUSE_S_FIRST
        said: set[AttemptKey] = set()  # bounded: UNHEARD_MAX
        while waiting := self._waiting():
            failed = tell_all(self._host, waiting)
            for entry, problem in failed:
                if entry.key not in said:
                    name = "abort_unheard" if entry.state == "ABORTED" else "forget_unheard"
                    self._host.events.add(name, attempt=str(entry.key), reason=problem)
            said = {entry.key for entry, _ in failed}
            if failed:
                pause_s = PAUSE_S_FIRST if self._news.wait(pause_s) else min(2 * pause_s, PAUSE_S_MAX)

    def _waiting(self) -> list[Entry]:
        """Whom to tell; with nobody left, or at the node's end, the thread is over before anybody can miss it."""
        with self._lock:
            self._news.clear()
            waiting = [] if self._stopping else unheard(self._host)
            if not waiting:
                self._thread = None
            return waiting
