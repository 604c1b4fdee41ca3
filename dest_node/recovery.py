"""What a destination finds in its journal about the guest that its agent holds. Pure.

Rule 1: a journal may hold several legs: an entry is about the image at hand only if its epoch says so.
Rule 2: a guest that was given away at some epoch comes back, if it does, at a later one: whatever is said about
        that epoch or an earlier one is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from host.agent_link import Hello
    from host.journal import Entry


def committed_image(entries: Sequence[Entry], hello: Hello) -> Entry | None:
    """The attempt that made the agent's guest ours. `entries` are the destination's, oldest first.

    An image that has not run yet is of the epoch that was given away; once it runs it is of the next one.
    """
    epochs = {"restored": hello.guest_epoch, "running": hello.guest_epoch - 1}
    taken = epochs.get(hello.state)
    mine = (entry for entry in reversed(entries) if entry.key.guest_epoch == taken)
    return next((entry for entry in mine if entry.state == "COMMITTED"), None)


def aborted_image(entries: Sequence[Entry], hello: Hello) -> Entry | None:
    """The attempt that left the agent an image that nobody may run: the newest of its epoch, if it was aborted."""
    if hello.state != "restored":
        return None
    newest = next((entry for entry in reversed(entries) if entry.key.guest_epoch == hello.guest_epoch), None)
    return newest if newest is not None and newest.state == "ABORTED" else None


def last_given_epoch(source_entries: Sequence[Entry]) -> int:
    """The newest epoch that this host gave away; 0 when it gave none."""
    given = (entry.key.guest_epoch for entry in source_entries if entry.state == "COMPLETED")
    return max(given, default=0)
