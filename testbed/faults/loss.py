"""`loss`: a share of the packets vanishes, each for itself or in bursts (Gilbert-Elliott).

The two states of the burst model are drawn beforehand, for a whole cycle of packets, and the kernel looks the
verdict up by the packet's number: no process stands in the way, and the same seed loses the same packets.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from testbed.faults import nft
from testbed.faults.parameters import SomeShare
from testbed.faults.rules import RulesFault, apply_rules, chosen, taking

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.faults.fault import Target, Undo

BURST_PACKETS_MAX = 1000.0  # far below a cycle, or the share would depend on the seed


class Loss(RulesFault):
    """`share` of the packets is lost; `burst_packets` is how many the mean bad state lasts."""

    kind: Literal["loss"]
    share: SomeShare
    burst_packets: Annotated[float, Field(ge=1.0, le=BURST_PACKETS_MAX, strict=False)] = 1.0
    share_in_burst: SomeShare = 1.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """A burst cannot hold what is lost on the whole."""
        if self.burst_packets > 1 and self.share >= self.share_in_burst:
            yield "share", f"{self.share:.2%} cannot be lost in bursts that lose {self.share_in_burst:.2%}"
        if self.burst_packets == 1 and self.share_in_burst != 1:
            yield "share_in_burst", "means nothing without burst_packets"

    def numbers(self, seed: int) -> list[int]:
        """Which packets of a cycle are lost, ascending."""
        if self.burst_packets == 1:
            return chosen(self.share, seed)
        return gilbert_elliott(self.share, self.burst_packets, self.share_in_burst, Random(seed))

    def apply(self, target: Target) -> Undo:
        """Drops the chosen ones."""
        return apply_rules(
            target,
            self.direction,
            lambda addresses, seed: taking(addresses, self.numbers(seed), "drop"),
        )


def gilbert_elliott(share: float, burst_packets: float, share_in_burst: float, dice: Random) -> list[int]:
    """Lost packets of one cycle, ascending: none in the good state, `share_in_burst` in the bad one.

    The bad state is left with 1 / burst_packets after each packet, and entered as often as makes `share` on the
    whole (Gilbert 1960, Elliott 1963). The chain begins in its stationary state.
    """
    bad_share = share / share_in_burst
    leave = 1 / burst_packets
    enter = min(1.0, leave * bad_share / (1 - bad_share))
    bad = dice.random() < bad_share
    lost = []
    for number in range(nft.CYCLE):
        if bad and dice.random() < share_in_burst:
            lost.append(number)
        bad = dice.random() >= leave if bad else dice.random() < enter
    return lost or [dice.randrange(nft.CYCLE)]
