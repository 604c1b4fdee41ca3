"""What a hint does at the source beyond leaving the round's send set: nothing, unless an experiment says otherwise.

Rule 1: the safe rule touches no dirty log: a page that the guest took back and wrote is in the next harvest.
Rule 2: the unsafe rule is what has been done elsewhere: it clears the dirty log of hinted pages when the hint is
        processed, and loses what the guest wrote to them before that (FACTS section 5, hazard 1). It exists to
        show that this is caught, has to be asked for by its full name, and stands in every report of its run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.events import HintsReported
    from migration.pages import U32Array, U64Array

SAFE: Final = "safe"
UNSAFE: Final = "unsafe_clear_dirty_log_at_hint"


class HintRule(Protocol):
    """Told of every batch of hints, before the round's set is."""

    @property
    def name(self) -> str:
        """As in the report."""

    def hinted(self, batch: HintsReported) -> None:
        """These ranges are hinted and are about to leave the send set."""


class SafeRule:
    """Nothing (rule 1)."""

    name = SAFE

    def hinted(self, batch: HintsReported) -> None:
        """A hint clears the send set only, and that is the round's own business."""


class UnsafeClearDirtyLogAtHint:
    """Loses writes (rule 2). `forget` clears the dirty log of page ranges."""

    name = UNSAFE

    def __init__(self, forget: Callable[[U64Array, U32Array | U64Array], None]) -> None:
        self._forget = forget

    def hinted(self, batch: HintsReported) -> None:
        """Clear the log of the hinted ranges, as if nobody could have written there."""
        if batch.pfn_first.size:
            self._forget(batch.pfn_first, batch.page_count)
