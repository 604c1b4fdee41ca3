"""The durable record of who may run the guest (DESIGN 3.4).

Rule 1: one process at a time: the journal is opened under an exclusive lock on `<path>.lock`.
Rule 2: a state is entered only from a state that the caller expected; anything else is a JournalConflict
        that names what was found. Test and change are one statement.
Rule 3: when a method returns, the disk has it (SQLite, write-ahead log, synchronous=FULL).
Rule 4: an attempt is known by migration, attempt *and* guest epoch; another epoch is another attempt.
Rule 5: nothing is removed but by `forget`, which the other side's "Forget" or "I know" allows.

The journal keeps states as words and gives them no meaning: the machines in `migration` own the tables.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from host.errors import JournalConflict, JournalLocked
from migration.identity import AttemptKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["FINAL_STATES", "AttemptKey", "Entry", "Journal", "Role", "read_entries"]

Role = Literal["source", "dest"]

FINAL_STATES = frozenset({"ABORTED", "COMMITTED", "COMPLETED"})  # see migration.events.Recorded

_PID_BYTES_MAX = 20  # decimal digits of the lock holder; more is not ours

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    migration   TEXT    NOT NULL,
    attempt     INTEGER NOT NULL,
    guest_epoch INTEGER NOT NULL,
    role        TEXT    NOT NULL CHECK (role IN ('source', 'dest')),
    state       TEXT    NOT NULL,
    digest      TEXT,              -- image digest, 16 hex digits: SQLite integers are signed
    detail      TEXT    NOT NULL,
    updated_ns  INTEGER NOT NULL,  -- CLOCK_REALTIME, for people
    PRIMARY KEY (migration, attempt, role)
) STRICT
"""
_COLUMNS = "migration, attempt, guest_epoch, role, state, digest, detail, updated_ns"
_INSERT = f"INSERT INTO attempts ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?)"  # noqa: S608 - constants only
_SELECT = f"SELECT {_COLUMNS} FROM attempts"  # noqa: S608 - constants only
_MOVE = (
    "UPDATE attempts SET state = ?, digest = COALESCE(?, digest), detail = ?, updated_ns = ?"  # noqa: S608
    " WHERE migration = ? AND attempt = ? AND role = ? AND guest_epoch = ?"
    f" AND state IN (SELECT value FROM json_each(?)) RETURNING {_COLUMNS}"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt, as recorded."""

    key: AttemptKey
    role: Role
    state: str
    digest: int | None
    detail: str
    updated_ns: int


class Journal:
    """One host's journal. Thread-safe; a context manager that closes itself.

    Raises:
        JournalLocked: another process has it open.
    """

    def __init__(self, path: str | Path, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self.path = os.fspath(path)
        self._now_ns = now_ns
        self._guard = threading.Lock()
        self._lock_fd = _lock(self.path)
        try:
            self._database = _open(self.path)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(
        self, key: AttemptKey, role: Role, state: str, *, digest: int | None = None, detail: str = ""
    ) -> Entry:
        """Record a new attempt. Raises JournalConflict when it is there already, in whatever state."""
        row = (key.migration, key.attempt, key.guest_epoch, role, state, _hex(digest), detail, self._now_ns())
        with self._guard:
            try:
                self._database.execute(_INSERT, row)
            except sqlite3.IntegrityError as error:
                found = self._find(key, role, any_epoch=True)
                raise JournalConflict(f"cannot begin {_name(key, role)}: found {_told(found)}") from error
            return Entry(key, role, state, digest, detail, row[-1])

    def move(
        self,
        key: AttemptKey,
        role: Role,
        expected: Collection[str],
        to: str,
        *,
        digest: int | None = None,
        detail: str = "",
    ) -> Entry:
        """Enter state `to` if the attempt is in one of `expected`; a digest of None keeps the recorded one.

        Raises:
            JournalConflict: it is in another state, unknown, or of another guest epoch.
        """
        where = (key.migration, key.attempt, role, key.guest_epoch, json.dumps(sorted(expected)))
        with self._guard:
            rows = self._database.execute(
                _MOVE, (to, _hex(digest), detail, self._now_ns(), *where)
            ).fetchall()
            if rows:
                return _entry(rows[0])
            found = self._find(key, role, any_epoch=True)
        wanted = " or ".join(sorted(expected))
        told = f"expected {wanted}, found {_told(found)}"
        raise JournalConflict(f"cannot move {_name(key, role)} to {to}: {told}")

    def get(self, key: AttemptKey, role: Role) -> Entry | None:
        """The entry of exactly this attempt, epoch included; None when unknown."""
        with self._guard:
            return self._find(key, role, any_epoch=False)

    def get_any_epoch(self, key: AttemptKey, role: Role) -> Entry | None:
        """The entry of this migration's attempt, of whatever epoch: `begin` refuses another one beside it."""
        with self._guard:
            return self._find(key, role, any_epoch=True)

    def count(self, role: Role) -> int:
        """How many entries this role has."""
        with self._guard:
            found = self._database.execute("SELECT COUNT(*) FROM attempts WHERE role = ?", (role,)).fetchone()
        return int(found[0])

    def newest(self, role: Role) -> Entry | None:
        """The entry that was begun last in this role."""
        found = self._select("WHERE role = ? ORDER BY rowid DESC LIMIT 1", (role,))
        return found[0] if found else None

    def entries(self, role: Role) -> list[Entry]:
        """All entries of this role, oldest first."""
        return self._select("WHERE role = ? ORDER BY rowid", (role,))

    def unfinished(self, role: Role | None = None, *, final: Collection[str] = FINAL_STATES) -> list[Entry]:
        """Entries in none of the `final` states, oldest first."""
        roles: tuple[Role, ...] = ("source", "dest") if role is None else (role,)
        rows = self._select(f"WHERE role IN ({','.join('?' * len(roles))}) ORDER BY rowid", roles)
        return [entry for entry in rows if entry.state not in final]

    def forget(self, key: AttemptKey, role: Role) -> bool:
        """Remove the attempt; False when it was not there."""
        where = (key.migration, key.attempt, key.guest_epoch, role)
        with self._guard:
            cursor = self._database.execute(
                "DELETE FROM attempts WHERE migration = ? AND attempt = ? AND guest_epoch = ? AND role = ?",
                where,
            )
            return cursor.rowcount > 0

    def close(self) -> None:
        """Release the database, then the lock. Idempotent."""
        with self._guard:
            self._database.close()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def _find(self, key: AttemptKey, role: Role, *, any_epoch: bool) -> Entry | None:
        row = self._database.execute(
            f"{_SELECT} WHERE migration = ? AND attempt = ? AND role = ?",
            (key.migration, key.attempt, role),
        ).fetchone()
        entry = None if row is None else _entry(row)
        return entry if entry is None or any_epoch or entry.key == key else None

    def _select(self, clause: str, values: tuple[object, ...]) -> list[Entry]:
        with self._guard:
            rows = self._database.execute(f"{_SELECT} {clause}", values).fetchall()
        return [_entry(row) for row in rows]


def read_entries(path: str | Path, role: Role) -> list[Entry]:
    """All entries of this role, oldest first, of a journal that another process may have open. Changes nothing.

    Raises:
        OSError: there is no such file, or it is no journal.
    """
    uri = f"{Path(path).resolve().as_uri()}?mode=ro"
    try:
        database = sqlite3.connect(uri, uri=True)
        try:
            rows = database.execute(f"{_SELECT} WHERE role = ? ORDER BY rowid", (role,)).fetchall()
        finally:
            database.close()
    except sqlite3.Error as error:
        raise OSError(f"{path}: cannot be read as a journal: {error}") from error
    return [_entry(row) for row in rows]


def _lock(path: str) -> int:
    """Take the exclusive lock and write our pid into it; the lock ends with the descriptor."""
    descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, _PID_BYTES_MAX, 0)
        os.close(descriptor)
        raise JournalLocked(path, int(holder) if holder.isdigit() else None) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: str) -> sqlite3.Connection:
    # Autocommit: every statement is its own durable transaction, and there is none of two statements.
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database


def _entry(row: tuple[str, int, int, Role, str, str | None, str, int]) -> Entry:
    migration, attempt, guest_epoch, role, state, digest, detail, updated_ns = row
    key = AttemptKey(migration, attempt, guest_epoch)
    return Entry(key, role, state, None if digest is None else int(digest, 16), detail, updated_ns)


def _hex(digest: int | None) -> str | None:
    return None if digest is None else f"{digest:016x}"


def _name(key: AttemptKey, role: Role) -> str:
    return f"{role} attempt {key}"


def _told(entry: Entry | None) -> str:
    return "nothing" if entry is None else f"{entry.state} of epoch {entry.key.guest_epoch}"
