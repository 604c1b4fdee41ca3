"""What must hold in every world, whatever went wrong (DESIGN 3.3, 3.4, 3.7).

Rule 1: never two owners: at most one agent runs the guest, at every moment.
Rule 2: after the faults healed there is exactly one, within a bound; none only where the process that held the
        guest was killed.
Rule 3: every write the guest made is in its owner's memory, and the guest is the newest there was.
Rule 4: when the guest starts at the destination, its memory there is what it left behind; a page that never
        crossed is free, or zero.
Rule 5: what the balloon holds is not sent. The next host takes no page for ballooned that is the guest's, knows
        those that never crossed, and all of them are zero there. At the end the balloon can be emptied.
Rule 6: books balance, the guest has its hinted pages back, and nothing grows without a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from testbed.sim.errors import ViolationError
from testbed.sim.guest import State
from testbed.sim.guest_memory import BALLOONED, HELD, NEEDED, USED

if TYPE_CHECKING:
    from migration.pages import BoolArray
    from testbed.sim.guest import Agent, Guest
    from testbed.sim.guest_memory import Truth
    from testbed.sim.node import Host, Node

JOURNAL_ROWS_MAX = 64


def one_owner(agents: list[Agent]) -> None:
    """Rule 1."""
    owners = [agent.name for agent in agents if agent.alive and agent.state is State.RUNNING]
    if len(owners) > 1:
        raise ViolationError("never two owners", f"the guest runs at {' and at '.join(owners)}")


def handed_over(source: Agent, dest: Agent, truth: Truth) -> None:
    """Rule 4, at the moment when the guest starts to run at `dest`."""
    there = dest.guest
    assert there is not None, "a guest starts"
    if not np.array_equal(there.kinds, truth.kinds):
        raise ViolationError("no lost write", "the guest that starts is older than the one that was paused")
    here = source.guest
    if not source.alive or here is None:
        return
    meaningful = np.isin(there.kinds, NEEDED) & ~truth.void
    differs = (here.ram.words != there.ram.words).any(axis=1) & meaningful
    if differs.any():
        pfn = int(np.flatnonzero(differs)[0])
        raise ViolationError(
            "no lost write",
            f"{int(differs.sum())} pages differ at the destination; page {pfn} is {int(there.ram.words[pfn, 0])}"
            f" and was {int(here.ram.words[pfn, 0])}",
        )


def balloon_arrived(source: Host, dest: Host, truth: Truth) -> None:
    """Rule 5, at the same moment: which pages are in the balloon, and what the destination has of them."""
    guest = dest.agent.guest
    assert guest is not None, "a guest starts"
    assert dest.node is not None, "a guest is started by its node"
    in_balloon = (guest.kinds == BALLOONED) & ~truth.void
    deflating = np.zeros_like(in_balloon)
    deflating[guest.driver.deflating()] = True
    there = dest.node.balloon.ballooned(guest.ram.pages).mask()
    world = dest.node.world
    world.count("balloon known to the next host", there.any())
    world.count("balloon deflated, and not yet taken out, at the hand-over", (there & deflating).any())
    _none(
        there & ~(in_balloon | deflating | truth.void),
        "is the guest's, and the next host has it in the balloon",
    )
    _none(there & guest.ram.populated() & ~truth.void, "is in the balloon and has storage at the next host")
    if source.node is None or not source.agent.alive or (receiver := dest.node.intake.receiver) is None:
        return  # what a restarted process does not know it does not know
    here = source.node.balloon.ballooned(guest.ram.pages).mask() & in_balloon & ~deflating
    _none(here & guest.ram.words.any(axis=1), "was in the balloon and is not zero at the next host")
    _none(
        here & ~there & (receiver.stored_hashes == 0), "was in the balloon, and the next host does not know"
    )


def _none(pages: BoolArray, what: str) -> None:
    if pages.any():
        found = np.flatnonzero(pages)
        raise ViolationError("the balloon is intact", f"page {int(found[0])} {what} ({len(found)} in all)")


def balloon_is_empty(node: Node, guest: Guest) -> bool:
    """Rule 5, when a balloon of no pages was asked for: guest, driver and device agree."""
    driver, device = guest.driver.balloon, node.balloon.device
    ballooned = (guest.kinds == BALLOONED).any()
    return not (ballooned or driver.actual or device.config.actual)


def memory_is_whole(owner: Agent, truth: Truth) -> None:
    """Rule 3."""
    guest = owner.guest
    assert guest is not None, "an owner has a guest"
    if not np.array_equal(guest.kinds, truth.kinds):
        raise ViolationError("no lost write", "the owner's guest is not the newest")
    used = (guest.kinds == USED) & ~truth.void
    wrong = (guest.ram.words != truth.content[:, None]).any(axis=1) & used
    if wrong.any():
        pfn = int(np.flatnonzero(wrong)[0])
        raise ViolationError("no lost write", f"page {pfn} is not what the guest wrote last")


def hints_given_back(host: Host) -> None:
    """Rule 6: DONE."""
    node, guest = host.node, host.agent.guest
    assert node is not None, "a host that owns a guest has a node"
    assert guest is not None, "an owner has a guest"
    if not node.balloon.told_done:
        raise ViolationError(
            "the guest has its pages back", f"hints are {node.balloon.device.hints.state.value}"
        )
    if (guest.kinds == HELD).any():
        raise ViolationError(
            "the guest has its pages back", f"{int((guest.kinds == HELD).sum())} pages are held"
        )


def nothing_is_left(hosts: list[Host]) -> None:
    """Rule 6: bounds."""
    for host in hosts:
        if len(host.journal) > JOURNAL_ROWS_MAX:
            raise ViolationError("bounded", f"{len(host.journal)} rows in the journal of {host.name}")
        network = host.network
        if network.pipes or network.calls:
            raise ViolationError(
                "bounded", f"{len(network.pipes)} streams and {len(network.calls)} calls are left"
            )
