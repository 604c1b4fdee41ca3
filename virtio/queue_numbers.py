"""Which queue a ring number means: the standard's fixed numbers, or Linux's packed ones.

Rule 1: the standard (section 5.5.2) numbers the queues 0-4 whether or not their feature is on. Linux's driver
        counts only the queues it uses: inflate, deflate, then statistics, hints and reporting if negotiated.
Rule 2: nobody says which numbering is in use, so it is read off what the front-end sets up. Packed numbers have
        no gap and come in ascending order, so ring n is packed only if every ring below n was set up before.
        Fixed numbers name no queue whose feature is off.
Rule 3: where both numberings agree on all negotiated queues there is nothing to find out.
Rule 4: each ring that is set up is evidence. A number beyond the packed ones settles "fixed" for good; a number
        of a queue that was not negotiated says "packed"; a gap below a ring says "fixed". A new driver (features
        set to something else) starts from nothing. Until it is known, a ring has the queue that both agree on.

The sets of features that differ are those with a later queue and not an earlier one: hints or reporting without
statistics, and statistics with reporting but without hints.
"""

from __future__ import annotations

from typing import Literal

from virtio.balloon import (
    F_FREE_PAGE_HINT,
    F_REPORTING,
    F_STATS_VQ,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    has,
)

Numbering = Literal["same", "fixed", "packed", "undecided"]
_FEATURE_OF = {
    QUEUE_STATS: F_STATS_VQ,
    QUEUE_HINT: F_FREE_PAGE_HINT,
    QUEUE_REPORTING: F_REPORTING,
}


class QueueNumbers:
    """The numbering of one driver's rings.

    Attributes:
        queues: the queues that were negotiated, ascending; a packed driver's ring number is the index here.
    """

    def __init__(self, features: int = 0) -> None:
        """Nothing set up yet by a driver that accepted `features`."""
        self.queues = [QUEUE_INFLATE, QUEUE_DEFLATE]
        self.queues += [queue for queue, feature in _FEATURE_OF.items() if has(features, feature)]
        self._guess: Numbering = "undecided"
        self._settled = False
        self._seen: set[int] = set()

    @property
    def numbering(self) -> Numbering:
        """What is known by now."""
        return "same" if self.queues == list(range(len(self.queues))) else self._guess

    def set_up(self, ring: int) -> None:
        """The front-end started ring number `ring`: look what that tells."""
        self._seen.add(ring)
        if self._settled:
            return
        if ring >= len(self.queues):
            self._guess, self._settled = "fixed", True
        elif ring not in self.queues:
            self._guess = "packed"
        elif self._guess == "undecided" and not self._seen.issuperset(range(ring)):
            self._guess = "fixed"

    def queue_of(self, ring: int) -> int | None:
        """The queue that a ring number means, None for one that was not negotiated or is not known yet."""
        fixed = ring if ring in self.queues else None
        packed = self.queues[ring] if ring < len(self.queues) else None
        match self.numbering:
            case "packed":
                return packed
            case "undecided":
                return fixed if fixed == packed else None
            case _:
                return fixed
