"""`ballast resolve`: an attempt whose other side will never return is ended by hand, where that is proved safe.

Rule 1: what is decided here is what the rules of ownership decide (DESIGN 3.4); an operator adds only what the
        hosts cannot know: that somebody is dead. What is not proved is refused, in one line that says what is
        missing.
Rule 2: a dead source: its guest may run at the destination if that is COMMITTED, or if the source's journal says
        COMMITTING: a source that has recorded it never runs the guest again by itself. Whether it is really dead
        does not matter then.
Rule 3: a dead destination: its lock on its own journal is taken, so that no process of it acts or will act, and
        ABORTED is recorded *there* before the source is told. Silence is no proof. Where that journal cannot be
        had, the host must be gone, and the operator must say that it is fenced, and why.
Rule 4: effects are made by the node that lives, through its machine, conditional on its journal; with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from host.errors import JournalLocked
from host.journal import Journal, read_entries
from migration.pb import node_pb2
from testbed.errors import RunBrokenError
from testbed.host_handles import SHORT_NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from host.journal import Entry
    from host.journal import Role as JournalRole
    from migration.identity import AttemptKey
    from testbed.host_handles import Host
    from testbed.record.run_dir import RunDir

Dead: TypeAlias = Literal["source", "dest"]
Word: TypeAlias = Literal["COMMITTED", "ABORTED"]

JOURNAL: Final = "journal.sqlite"
OPEN_AT_DEST: Final = frozenset({"RECEIVING", "PREPARED"})


class ResolveRefusedError(RunBrokenError):
    """Nothing was done; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the side that lives is to be told."""

    verdict: Word
    why: str
    digest: int = 0
    burns: bool = False  # ABORTED is recorded in the dead destination's journal first


def of_dead_source(source: Entry | None, dest: Entry | None, unreadable: str = "") -> Ruling:
    """What the destination may do. `unreadable` says why there is no `source`, where its journal cannot be read.

    Raises:
        ResolveRefusedError.
    """
    if dest is None:
        raise ResolveRefusedError("the destination's journal knows no attempt: it has no image to run")
    if dest.state == "COMMITTED":
        return Ruling("COMMITTED", "the destination had committed", dest.digest or 0)
    if dest.state == "ABORTED":
        raise ResolveRefusedError(
            "the destination's journal says ABORTED: it has no image, and the guest is the source's"
        )
    if dest.state != "PREPARED":
        raise ResolveRefusedError(f"the destination is {dest.state}: it has not the whole image")
    if source is None:
        missing = unreadable or "it does not know the attempt"
        raise ResolveRefusedError(
            f"the source's journal does not prove that it never runs the guest again: {missing}"
        )
    if source.state == "ABORTED":
        return Ruling("ABORTED", "the source had burned the attempt", burns=False)
    if source.state != "COMMITTING":
        raise ResolveRefusedError(
            f"the source's journal says {source.state}, not COMMITTING:"
            " a source that is started again runs the guest itself"
        )
    if source.digest != dest.digest:
        raise ResolveRefusedError(
            "the source committed another image than the one that the destination prepared"
        )
    return Ruling("COMMITTED", "the source's journal says COMMITTING", dest.digest or 0)


def of_dead_dest(
    source: Entry | None, dest: Entry | None, *, alive: str, unreadable: str, fenced: str
) -> Ruling:
    """What the source may do.

    `alive` says why the destination is not known to be dead ("" when its own lock is ours, or its host is gone),
    `unreadable` why its journal cannot be had ("" when it can), `fenced` is the operator's statement.

    Raises:
        ResolveRefusedError.
    """
    if source is None:
        raise ResolveRefusedError("the source's journal knows no attempt: there is nothing to resolve")
    if source.state == "ABORTED":
        return Ruling("ABORTED", "the source had turned back already")
    if source.state == "COMPLETED":
        raise ResolveRefusedError("the source's journal says COMPLETED: the guest was the destination's")
    if source.state != "COMMITTING":
        raise ResolveRefusedError(
            f"the source's journal says {source.state}: it waits for nobody, cancelling is enough"
        )
    if alive:
        raise ResolveRefusedError(f"{alive}: silence is no proof that it is dead")
    if unreadable:
        if not fenced:
            raise ResolveRefusedError(
                f"the destination's journal cannot be had ({unreadable}): say --fenced REASON"
                " if it is certain that its guest does not run and never will"
            )
        return Ruling("ABORTED", f"the destination is fenced: {fenced}")
    if dest is not None and dest.state == "COMMITTED":
        return Ruling("COMMITTED", "the destination had committed; a guest that died there is lost")
    return Ruling("ABORTED", "the destination is dead and had not committed", burns=True)


def resolve(run_dir: RunDir, giver: Host, taker: Host, *, dead: Dead, fenced: str) -> dict[str, Any]:
    """Looks, decides, and has the living side act; what was done.

    Raises:
        ResolveRefusedError: with what is missing.
        RunBrokenError: the living side does not answer, or refused.
    """
    if dead == "source":
        return _without_source(run_dir, giver, taker)
    return _without_dest(run_dir, giver, taker, fenced)


def _without_source(run_dir: RunDir, giver: Host, taker: Host) -> dict[str, Any]:
    _must_live(taker)
    dest = _newest(journal_of(run_dir, taker), "dest")
    source, unreadable = None, ""
    try:
        source = _same(read_entries(journal_of(run_dir, giver), "source"), dest)
    except OSError as error:
        unreadable = str(error)
    ruling = of_dead_source(source, dest, unreadable)
    assert dest is not None, "there is no ruling without an attempt"
    return _told(taker, "dest", dest.key, ruling)


def _without_dest(run_dir: RunDir, giver: Host, taker: Host, fenced: str) -> dict[str, Any]:
    _must_live(giver)
    source = _newest(journal_of(run_dir, giver), "source")
    alive, unreadable, path = "", "", journal_of(run_dir, taker)
    if taker.node.alive:
        alive = f"the destination's node (process {taker.node.pid}) runs"
    elif not path.exists():
        unreadable = f"{path} is missing"
    if alive or unreadable:
        ruling = of_dead_dest(source, None, alive=alive, unreadable=unreadable, fenced=fenced)
        assert source is not None, "there is no ruling without an attempt"
        return _told(giver, "source", source.key, ruling)
    try:
        with Journal(path) as journal:  # the lock is ours until the source has acted
            dest = _same(journal.entries("dest"), source)
            ruling = of_dead_dest(source, dest, alive="", unreadable="", fenced=fenced)
            assert source is not None, "there is no ruling without an attempt"
            if ruling.burns and dest is not None and dest.state in OPEN_AT_DEST:
                journal.move(dest.key, "dest", OPEN_AT_DEST, "ABORTED", detail=f"resolved: {ruling.why}")
            return _told(giver, "source", source.key, ruling)
    except JournalLocked as error:
        raise ResolveRefusedError(f"{error}: silence is no proof that it is dead") from error


def _told(host: Host, role: JournalRole, key: AttemptKey, ruling: Ruling) -> dict[str, Any]:
    request = node_pb2.ResolveRequest(
        migration=key.migration,
        attempt=key.attempt,
        guest_epoch=key.guest_epoch,
        role=role,
        verdict=ruling.verdict,
        image_digest=ruling.digest,
        reason=f"resolved by hand: {ruling.why}",
    )
    state = host.client.resolve(request)
    return {
        "attempt": str(key), "host": SHORT_NAMES[host.origin], "verdict": ruling.verdict, "state": state,
        "reason": ruling.why,
    }  # fmt: skip


def journal_of(run_dir: RunDir, host: Host) -> Path:
    """The file of a host's journal."""
    return run_dir.node(host.origin) / JOURNAL


def _must_live(host: Host) -> None:
    if not host.node.alive:
        raise ResolveRefusedError(
            f"the node of host {SHORT_NAMES[host.origin]} must act, and is dead: start it first"
        )


def _newest(path: Path, role: JournalRole) -> Entry | None:
    try:
        entries = read_entries(path, role)
    except OSError as error:
        raise ResolveRefusedError(str(error)) from error
    return entries[-1] if entries else None


def _same(entries: list[Entry], other: Entry | None) -> Entry | None:
    """The entry of the attempt that the other side has."""
    return next((entry for entry in entries if other is not None and entry.key == other.key), None)
