"""`duplicate`: a share of the packets arrives twice.

The second one is put on the wire towards the host, at the other end of its link: it arrives as packets do, and is
in the counters of the host's interface. It comes from a hardware address of its own, and is never chosen again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from testbed.faults.packets import HandlerFault, apply_handlers
from testbed.faults.parameters import SomeShare
from testbed.faults.rules import chosen
from testbed.faults.wire import other_end

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.faults.fault import Port, Target, Undo


COPIES_FROM: Final = "02:ba:11:a5:70:01"  # locally administered: nobody else's


class Duplicate(HandlerFault):
    """`share` of the packets arrives twice."""

    kind: Literal["duplicate"]
    share: SomeShare

    def apply(self, target: Target) -> Undo:
        """The chosen packets go by a handler."""

        def options(port: Port, _: int) -> Sequence[str]:
            wire = other_end(port, target.ports)
            return [
                "--wire-namespace", wire.namespace, "--wire-interface", wire.interface,
                "--hardware-address", wire.hardware_address, "--copies-from", COPIES_FROM.replace(":", ""),
            ]  # fmt: skip

        return apply_handlers(
            target,
            self.direction,
            mode="duplicate",
            options_of=options,
            numbers_of=lambda seed: chosen(self.share, seed),
            only=f"ether saddr != {COPIES_FROM}",
        )
