"""`reorder`: a share of the packets is held back, and those behind them arrive first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from testbed.faults.packets import HandlerFault, apply_handlers
from testbed.faults.parameters import DurationMs, SomeShare
from testbed.faults.rules import chosen

if TYPE_CHECKING:
    from testbed.faults.fault import Target, Undo


class Reorder(HandlerFault):
    """`share` of the packets arrives `by` later than it came."""

    kind: Literal["reorder"]
    share: SomeShare
    by: Annotated[DurationMs, Field(ge=1)] = 5

    def apply(self, target: Target) -> Undo:
        """The chosen packets go by a handler, the others pass them."""
        return apply_handlers(
            target,
            self.direction,
            mode="hold",
            options_of=lambda *_: ["--delay-us", str(self.by * 1000)],
            numbers_of=lambda seed: chosen(self.share, seed),
        )
