"""The scenario's `[balloon]`: how large it is, what the guest's driver asks for, and what goes together.

Rule 1: keys other than `num_pages` are the guest driver's options and go to the agent as they are; the device
        offers everything, so what the driver asks for is what the two agree on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from testbed.documents import Model
from testbed.units import parse_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

Pages = Annotated[int, BeforeValidator(parse_pages)]


class Balloon(Model):
    """The balloon before the migration starts, and the guest's driver."""

    num_pages: Pages = 0
    hints: Literal["hold", "walk", "off"] = "hold"  # the merged driver, the series' one, none
    hint_wait_on_ack: bool = False  # a held block comes back only after the device used its buffer
    stats: bool = True
    reporting: bool = False  # free pages leave the host
    poison: Annotated[int, Field(ge=0, lt=2**32)] | None = None  # what freed memory is filled with
    sg: bool = True  # scatter-gather entries instead of arrays of page numbers
    must_tell_host: bool = True
    deflate_on_oom: bool = True

    def driver_options(self) -> dict[str, Any]:
        """What the guest agent is told (guest_agent/balloon_options.py)."""
        return self.model_dump(exclude={"num_pages"})


def balloon_conflicts(balloon: Balloon, *, migration_hints: bool) -> Iterator[tuple[str, str]]:
    """What is wrong among the keys, and between them and a migration that skips by hints."""
    if balloon.hint_wait_on_ack and balloon.hints != "hold":
        problem = f"means nothing with hints = '{balloon.hints}': only held blocks are given back"
        yield "balloon.hint_wait_on_ack", problem
    if migration_hints and balloon.hints == "off":
        yield "balloon.hints", "is 'off' and migration.skip wants hints; use skip 'none' or 'zero'"
    if migration_hints and balloon.poison:
        problem = (
            f"{balloon.poison:#x} and hints exclude each other: a skipped page would read as zero at the "
            "destination; use poison 0 or skip 'none' or 'zero'"
        )
        yield "balloon.poison", problem
