"""`partition`: packets between a host and the others vanish, both ways or one way.

They vanish where they arrive: the sender sees silence, as it would when a switch forgot about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from testbed.faults.rules import RulesFault, apply_rules, taking

if TYPE_CHECKING:
    from testbed.faults.fault import Target, Undo


class Partition(RulesFault):
    """Nothing arrives in `direction`."""

    kind: Literal["partition"]

    def apply(self, target: Target) -> Undo:
        """Drops everything that comes."""
        return apply_rules(target, self.direction, lambda addresses, _: taking(addresses, None, "drop"))
