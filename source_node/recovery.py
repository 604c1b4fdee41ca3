"""What a source finds in its journal about the guest that its agent holds. Pure.

Rule 1: a journal may hold several legs of the guest: only entries of the epoch that the agent's image has are about
        this guest here and now. Which entry is the newest says nothing: a host takes guests in between.
Rule 2: an attempt that is COMMITTING is asked about whatever the agent holds: only its destination can close it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from source_node.attempt_note import AttemptNote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from host.journal import Entry

GIVEN_AWAY = frozenset({"COMMITTING", "COMPLETED"})
ENDED = frozenset({"ABORTED", "COMPLETED"})


def to_take_up(entries: Sequence[Entry]) -> Entry | None:
    """The attempt whose outcome only its destination knows. `entries` are the source's, oldest first."""
    return next((entry for entry in reversed(entries) if entry.state == "COMMITTING"), None)


def given_away_by(entries: Sequence[Entry], guest_epoch: int) -> Entry | None:
    """The attempt that gave the guest of this epoch away, or may have."""
    mine = (entry for entry in reversed(entries) if entry.key.guest_epoch == guest_epoch)
    return next((entry for entry in mine if entry.state in GIVEN_AWAY), None)


def turned_back(entries: Sequence[Entry], guest_epoch: int) -> Entry | None:
    """The newest attempt on the guest of this epoch, if it was aborted: the guest is ours and may run."""
    newest = next((entry for entry in reversed(entries) if entry.key.guest_epoch == guest_epoch), None)
    return newest if newest is not None and newest.state == "ABORTED" else None


def untold(entries: Sequence[Entry]) -> Entry | None:
    """The newest attempt, if it has an outcome that its process did not live to tell."""
    newest = entries[-1] if entries else None
    if newest is None or newest.state not in ENDED or AttemptNote.read(newest.detail).told:
        return None
    return newest
