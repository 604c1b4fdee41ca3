"""`reset`: TCP connections between a host and the others are reset; new ones are refused while it lasts.

Every packet of theirs is answered with a reset, to both ends, so that both learn of it at once. Resets themselves
pass, or the first one would be the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from testbed.faults import nft
from testbed.faults.rules import RulesFault, apply_rules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.faults.fault import Target, Undo

NO_RESET = "tcp flags & rst == 0"
REJECT = f"{NO_RESET} counter reject with tcp reset"


class Reset(RulesFault):
    """Both directions, always: a connection has two ends."""

    kind: Literal["reset"]
    direction: Literal["both"] = "both"

    def apply(self, target: Target) -> Undo:
        """Rejects what comes in and what goes out, at this host alone."""

        def body(addresses: Sequence[str], _: int) -> str:
            outgoing = (
                f" chain outgoing {{\n  type filter hook output priority {nft.PRIORITY};\n"
                f"  ip daddr {{ {', '.join(addresses)} }} {REJECT}\n }}"
            )
            return f"{nft.incoming([f'{nft.from_hosts(addresses)} {REJECT}'])}\n{outgoing}"

        return apply_rules(target, "in", body)
