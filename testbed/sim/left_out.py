"""What a simulated source leaves out because the balloon holds it: looked up as the shell does, and watched.

Rule 1: what rests in the balloon when a round's set is made, by the guest's word and the device's, and was not
        written before, since the last set, is not sent in that round. What was written is sent, wherever it went.
Rule 2: planted bugs change what is told to the machine, never what is watched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.ballooned import ballooned_holes
from migration import events as told
from testbed.sim.errors import ViolationError
from testbed.sim.guest_memory import BALLOONED
from testbed.sim.plants import Plant

if TYPE_CHECKING:
    from host.trackers import DirtyTracker
    from migration.page_bits import PageBits
    from migration.pages import BoolArray, U64Array
    from testbed.sim.guest import Guest
    from testbed.sim.node import Node


class LeftOut:
    """One attempt's."""

    def __init__(self, node: Node, guest: Guest) -> None:
        self._node = node
        self._guest = guest
        self._holes: PageBits | None = None
        self._before: PageBits | None = None  # by the last harvest
        self._resting: BoolArray
        self._written: BoolArray  # between the last two harvests

    def tracking_ordered(self) -> None:
        """Too early to look: writes are not tracked yet."""
        if self._node.world.plant is Plant.BALLOON_LOOKED_UP_TOO_EARLY:
            self._holes = self._look()

    def tracking_started(self) -> PageBits | None:
        """Of round 1: the balloon's holes."""
        world = self._node.world
        if world.plant is not Plant.BALLOON_LOOKED_UP_TOO_EARLY:
            self._holes = self._look()
        self._resting = self._in_balloon(self._held())
        world.count("balloon left out of round 1", self._holes)
        return self._holes

    def harvested(self, tracker: DirtyTracker, *, last: bool) -> told.Harvested:
        """Of a later round: what the tracker says."""
        world, guest = self._node.world, self._guest
        written = guest.written.copy()
        dirty, left_out = tracker.harvest(), tracker.left_out
        since = written | self._written if last else written  # the last set has the one before in it
        held = self._held()
        self._resting, self._written = self._in_balloon(held) & ~since, written
        before, self._before = self._before, left_out
        early = written & held & (guest.kinds != BALLOONED)
        world.count("balloon written before the host was told", early.any())
        world.count(f"balloon left out of {'the last' if last else 'a later'} round", left_out)
        if world.plant is Plant.BALLOON_MASK_STALE and before is not None:
            dirty = dirty.minus(before)
        if world.plant is Plant.BALLOONED_THOUGH_WRITTEN:
            dirty = dirty.minus(held)
        return told.Harvested(dirty, left_out)

    def check(self, round_index: int, pfns: U64Array) -> None:
        """Before these are sent."""
        if self._resting[pfns].any():
            raise ViolationError("ballooned pages are not sent", f"round {round_index}")

    def _look(self) -> PageBits | None:
        return ballooned_holes(self._node.balloon, self._guest.ram)  # type: ignore[arg-type]  # the same face

    def _held(self) -> BoolArray:
        return self._node.balloon.ballooned(self._guest.ram.pages).mask()

    def _in_balloon(self, held: BoolArray) -> BoolArray:
        guest = self._guest
        resting: BoolArray = held & (guest.kinds == BALLOONED)
        return resting & ~guest.truth.void
