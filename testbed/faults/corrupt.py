"""`corrupt`: a bit of a share of the packets is another when they arrive.

With the checksum left as it is the receiving kernel drops them; with the checksum corrected they reach the program,
and its own hashes have to notice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from testbed.faults.packets import HandlerFault, apply_handlers
from testbed.faults.parameters import SomeShare
from testbed.faults.rules import chosen

if TYPE_CHECKING:
    from testbed.faults.fault import Target, Undo


class Corrupt(HandlerFault):
    """One bit in the payload of `share` of the packets."""

    kind: Literal["corrupt"]
    share: SomeShare
    checksum: Literal["broken", "fixed"] = "broken"

    def apply(self, target: Target) -> Undo:
        """The chosen packets go by a handler."""
        options = ["--fix-checksum"] if self.checksum == "fixed" else []
        return apply_handlers(
            target,
            self.direction,
            mode="corrupt",
            options_of=lambda *_: options,
            numbers_of=lambda seed: chosen(self.share, seed),
        )
