"""`delay`: packets arrive later, by a fixed time and up to `jitter` more, in order.

In each direction that is named: with both, the round trip takes twice the delay longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from testbed.faults.packets import HandlerFault, apply_handlers
from testbed.faults.parameters import DurationMs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.faults.fault import Target, Undo


class Delay(HandlerFault):
    """Every packet waits at its receiver."""

    kind: Literal["delay"]
    delay: DurationMs
    jitter: DurationMs = 0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """A delay of nothing is none."""
        if not self.delay and not self.jitter:
            yield "delay", "is 0 ms: nothing would happen"

    def apply(self, target: Target) -> Undo:
        """All packets go by a handler."""
        options = ["--delay-us", str(self.delay * 1000), "--jitter-us", str(self.jitter * 1000)]
        return apply_handlers(
            target, self.direction, mode="hold", options_of=lambda *_: options, numbers_of=lambda _: None
        )
