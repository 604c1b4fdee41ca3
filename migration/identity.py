"""Who a message is about: one attempt of one migration of one guest.

Rule 1: every control message carries the whole key; equality is on all three fields.
Rule 2: `guest_epoch` counts the hand-overs of the guest's ownership. The source gives away epoch e, the
        destination runs e + 1; nothing ever runs a guest at an epoch that was given away.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class AttemptKey:
    """One try to move one guest. `attempt` starts at 1 and rises with every retry of `migration`."""

    migration: str
    attempt: int
    guest_epoch: int

    @property
    def next_epoch(self) -> int:
        """The epoch at which the destination runs the guest."""
        return self.guest_epoch + 1

    def __str__(self) -> str:
        return f"{self.migration}#{self.attempt}@{self.guest_epoch}"
