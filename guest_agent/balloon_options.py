"""What a guest's balloon driver is asked to be: the scenario's `[balloon]` on the guest's side.

Rule 1: options say what the driver wants; what it gets is what the device offers of that (`features`).
Rule 2: a key that is not declared here, or a value of the wrong kind, is refused before anything is started.
Rule 3: options travel in the vCPU state: the guest is the same guest on the next host.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_HINT_WAIT_ON_ACK,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_RING_INDIRECT_DESC,
    F_SG,
    F_STATS_VQ,
    F_VERSION_1,
    U32_MAX,
    mask,
)
from virtio.balloon_driver import BalloonDriver

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HINTS_HOLD", "HINTS_OFF", "HINTS_WALK", "BalloonOptions"]

HINTS_HOLD: Final = "hold"  # the merged driver: hinted blocks are allocated and held until DONE
HINTS_WALK: Final = "walk"  # the series: free blocks are walked and reported, nothing is held
HINTS_OFF: Final = "off"
HINT_DRIVERS: Final = (HINTS_HOLD, HINTS_WALK, HINTS_OFF)


@dataclass(frozen=True, slots=True)
class BalloonOptions:
    """What the driver wants.

    Attributes:
        hints: which hint driver, or none.
        hint_wait_on_ack: a held block is not given back before the device used its buffer (feature bit 6).
        stats: answer memory statistics. reporting: report free pages (FREE_PAGE_REPORTING).
        poison: the 32-bit value that freed memory is filled with, None when it is not.
        sg: balloon by scatter-gather entries where the device can.
        must_tell_host: wait for the deflate acknowledgement before using a page.
        deflate_on_oom: give ballooned pages back when memory is out.
    """

    hints: str = HINTS_HOLD
    hint_wait_on_ack: bool = False
    stats: bool = True
    reporting: bool = False
    poison: int | None = None
    sg: bool = True
    must_tell_host: bool = True
    deflate_on_oom: bool = True

    @property
    def features(self) -> int:
        """The feature bits that the driver would accept, before the rules of section 5.5.3."""
        chosen = {
            F_MUST_TELL_HOST: self.must_tell_host,
            F_STATS_VQ: self.stats,
            F_DEFLATE_ON_OOM: self.deflate_on_oom,
            F_FREE_PAGE_HINT: self.hints != HINTS_OFF,
            F_PAGE_POISON: self.poison is not None,
            F_REPORTING: self.reporting,
            F_HINT_WAIT_ON_ACK: self.hint_wait_on_ack and self.hints == HINTS_HOLD,
            F_SG: self.sg,
        }
        wanted = [bit for bit, on in chosen.items() if on]
        return mask(*wanted, F_RING_INDIRECT_DESC, F_VERSION_1)

    def driver(self, batch_pages: int) -> BalloonDriver:
        """The driver's logic with these options."""
        return BalloonDriver(
            wanted=self.features,
            batch_pages=batch_pages,
            poison=self.poison,
            holds_hinted=self.hints == HINTS_HOLD,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BalloonOptions:
        """Options as the scenario or a saved guest has them.

        Raises:
            ValueError: an unknown key or an impossible value, by name.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"balloon: unknown options {', '.join(unknown)}")
        options = cls(**values)
        if options.hints not in HINT_DRIVERS:
            raise ValueError(f"balloon: hints: {options.hints!r} is none of {', '.join(HINT_DRIVERS)}")
        for name in sorted(known - {"hints", "poison"}):
            if not isinstance(getattr(options, name), bool):
                raise ValueError(f"balloon: {name}: {getattr(options, name)!r} is neither true nor false")  # noqa: TRY004 - one kind of error for whoever reads a file
        poison = options.poison
        if poison is not None and (type(poison) is not int or not 0 <= poison <= U32_MAX):
            raise ValueError(f"balloon: poison: {poison!r} is no 32-bit value")
        return options
