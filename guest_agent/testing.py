"""Guests without a process around them, for tests of this package and of whoever judges guests.

Rule 1: a clone is what a perfect migration makes: a byte-for-byte copy of RAM, opened as a restored guest.
Rule 2: nothing here is used by the agent itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.frames import FrameTable
from guest_agent.oracle import OracleLog
from guest_agent.ram import GuestRam
from guest_agent.workloads.base import Guest


@dataclass(frozen=True, slots=True)
class BareGuest:
    """RAM, boot page and what a workload runs on; close() gives the memory back."""

    ram: GuestRam
    boot: BootPage
    guest: Guest

    @classmethod
    def boot_new(cls, memory_bytes: int, oracle: Path, seed: int = 1) -> Self:
        """A new guest with all memory free."""
        ram = GuestRam.create(memory_bytes)
        boot = BootPage.format(ram)
        frames = FrameTable(ram, boot)
        buddy = BuddyAllocator(ram, boot, frames)
        return cls(ram, boot, Guest(ram, frames, buddy, OracleLog(oracle), seed))

    @classmethod
    def from_image(cls, ram: GuestRam, oracle: Path, seed: int = 1) -> Self:
        """A guest restored from RAM alone.

        Raises:
            RestoreError: RAM holds no guest.
        """
        boot = BootPage.open(ram)
        frames = FrameTable(ram, boot)
        buddy = BuddyAllocator.open(ram, boot, frames)
        return cls(ram, boot, Guest(ram, frames, buddy, OracleLog(oracle), seed))

    def clone(self, oracle: Path) -> Self:
        """A restored guest on a copy of this one's RAM, going on with the same or another oracle log."""
        copy = GuestRam.create(self.ram.memory_bytes)
        copy.words[:] = self.ram.words
        return self.from_image(copy, oracle, self.guest.seed)

    def close(self) -> None:
        """Close the memory and the log."""
        self.guest.oracle.close()
        self.ram.close()
