"""What must hold in every world, whatever went wrong (DESIGN 3.3, 3.4, 3.7).

Rule 1: never two owners: at most one agent runs the guest, at every moment.
Rule 2: after the faults healed there is exactly one, within a bound; none only where the process that held the
        guest
        was killed.
Rule 3: every write the guest made is in its owner's memory, and the guest is the newest there was.
Rule 4: when the guest starts at the destination, its memory there is what it left behind; a page that never
        crossed is
        free, or zero.
Rule 5: books balance, the guest has its hinted pages back, and nothing grows without a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from testbed.sim.errors import ViolationError
from testbed.sim.guest import FREE, HELD, USED, State

if TYPE_CHECKING:
    from testbed.sim.guest import Agent, Truth
    from testbed.sim.node import Host

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
    meaningful = ~np.isin(there.kinds, (FREE, HELD)) & ~truth.void
    differs = (here.ram.words != there.ram.words).any(axis=1) & meaningful
    if differs.any():
        pfn = int(np.flatnonzero(differs)[0])
        raise ViolationError(
            "no lost write",
            f"{int(differs.sum())} pages differ at the destination; page {pfn} is {int(there.ram.words[pfn, 0])}"
            f" and was {int(here.ram.words[pfn, 0])}",
        )


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
    """Rule 5: DONE."""
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
    """Rule 5: bounds."""
    for host in hosts:
        if len(host.journal) > JOURNAL_ROWS_MAX:
            raise ViolationError("bounded", f"{len(host.journal)} rows in the journal of {host.name}")
        network = host.network
        if network.pipes or network.calls:
            raise ViolationError(
                "bounded", f"{len(network.pipes)} streams and {len(network.calls)} calls are left"
            )
