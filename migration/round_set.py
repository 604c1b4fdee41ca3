"""The pages that one pre-copy round has to send.

Rule 1: the set is what a harvest found; it is complete before the first hint of its round may arrive.
Rule 2: a hint clears bits in this set only, only those not yet taken for sending, and touches no dirty log.
Rule 3: pages are taken in ascending order, each at most once: all below the cursor are taken or skipped.
Rule 4: the round ends when nothing remains, with books that balance (migration.ledger).

Rules 1 and 2 together make hints safe: a page that the guest took back and wrote is dirty in a harvest
made after the hint's command id was closed, and so it is a candidate of a later round.
"""

import numpy as np

from migration.errors import LocalProtocolError
from migration.ledger import RoundLedger, RoundTotals
from migration.page_set import PageSet
from migration.pages import BoolArray, U32Array, U64Array, windows_of


class RoundSet:
    """Send set, hint accounting and cursor of one round. `index` is 1-based."""

    def __init__(self, index: int, candidates: BoolArray, hints_allowed: bool) -> None:
        self.index = index
        self.hints_allowed = hints_allowed
        self._candidates = candidates.copy()
        self._to_send = PageSet.of_mask(candidates)
        self._hinted: BoolArray = np.zeros(candidates.size, np.bool_)
        self._skipped: BoolArray = np.zeros(candidates.size, np.bool_)
        self._cursor = 0
        self._remaining = self._to_send.count
        self._finished = False
        self.ledger = RoundLedger(index=index, candidate_pages=self._to_send.count)

    @property
    def pages(self) -> int:
        """How many pages the guest has."""
        return self._candidates.size

    @property
    def remaining(self) -> int:
        """Candidates that were neither taken nor skipped so far."""
        return self._remaining

    @property
    def candidates(self) -> BoolArray:
        """The mask (pages,) of the round's set as it was harvested, read-only."""
        return _read_only(self._candidates)

    @property
    def skipped(self) -> BoolArray:
        """The mask (pages,) of candidates that hints removed so far, read-only."""
        return _read_only(self._skipped)

    def hint(self, pfn_first: U64Array, page_count: U32Array | U64Array) -> int:
        """Takes the free ranges of one batch of hints out of what is still to be sent.

        The ranges were checked against the guest's memory by the hint session; they may overlap, repeat and
        come in any order.

        Returns:
            The number of pages that will not be sent because of this batch.

        Raises:
            LocalProtocolError: hints are off in this round, the round is over, or a range is out of memory.
        """
        if not self.hints_allowed:
            raise LocalProtocolError("a hint in a round without hints", round_index=self.index)
        self._require_open()
        skipped_before = self.ledger.skipped_pages
        for window, covered in windows_of(pfn_first, page_count, pages=self.pages):
            fresh = ~self._hinted[window]
            if covered is not None:
                fresh &= covered
            self._count_window(window, fresh)
        return self.ledger.skipped_pages - skipped_before

    def _count_window(self, window: slice, fresh: BoolArray) -> None:
        """Books the pages of `window` that are hinted for the first time in this round."""
        ledger = self.ledger
        hinted = int(np.count_nonzero(fresh))
        if not hinted:
            return
        self._hinted[window] |= fresh
        wanted = fresh & self._candidates[window]
        in_set = int(np.count_nonzero(wanted))
        # Everything below the cursor is taken or skipped already; a fresh page there can only be late.
        wanted[: max(0, self._cursor - window.start)] = False
        removed = self._to_send.discard_window(window, wanted)
        self._skipped[window] |= wanted
        self._remaining -= removed
        ledger.hinted_pages += hinted
        ledger.absent_pages += hinted - in_set
        ledger.skipped_pages += removed
        ledger.late_pages += in_set - removed

    def take(self, count: int) -> U64Array:
        """The next `count` pages to send, ascending; fewer at the end, none when nothing remains.

        Raises:
            LocalProtocolError: the round is over.
        """
        self._require_open()
        pfns, self._cursor = self._to_send.take(self._cursor, count)
        self._remaining -= pfns.size
        return pfns

    def record_sent(self, data_pages: int, zero_pages: int, payload_bytes: int) -> None:
        """Books pages that were taken and have gone out, as data or as zero records."""
        self._require_open()
        self.ledger.sent_pages += data_pages
        self.ledger.zero_pages += zero_pages
        self.ledger.payload_bytes += payload_bytes

    def finish(self, dirty: BoolArray | None) -> RoundTotals:
        """Ends the round with the mask of the harvest that ended it (None: the guest was paused, no harvest).

        Raises:
            LocalProtocolError: pages remain, the books do not balance, or the round was over already.
        """
        self._require_open()
        if self._remaining:
            raise LocalProtocolError(
                "the round is not over", round_index=self.index, remaining=self._remaining
            )
        if dirty is not None:
            self.ledger.redirtied_pages = int(np.count_nonzero(self._skipped & dirty))
        totals = self.ledger.freeze()
        self._finished = True
        return totals

    def _require_open(self) -> None:
        if self._finished:
            raise LocalProtocolError("the round is over", round_index=self.index)


def _read_only(mask: BoolArray) -> BoolArray:
    view = mask.view()
    view.flags.writeable = False
    return view
