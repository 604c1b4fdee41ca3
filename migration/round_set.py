"""The pages that one pre-copy round has to send.

Rule 1: the set is what a harvest found; it is complete before the first hint of its round may arrive.
Rule 2: a hint clears bits in this set only, only those not yet taken for sending, and touches no dirty log.
Rule 3: pages are taken in ascending order, each at most once: all below the cursor are taken or skipped.
Rule 4: the round ends when nothing remains, with books that balance (migration.ledger).
Rule 5: hints are checked when they come and applied when somebody looks: a report of a large guest is thousands of
        batches, and one pass over all of them costs what one pass over one of them does.

Rules 1 and 2 together make hints safe: a page that the guest took back and wrote is dirty in a harvest
made after the hint's command id was closed, and so it is a candidate of a later round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from migration.errors import LocalProtocolError
from migration.ledger import RoundLedger, RoundTotals
from migration.page_bits import PORTION_WORDS, WORD_BITS, PageBits, covers, pages_in, popcount

if TYPE_CHECKING:
    from migration.pages import BoolArray, U32Array, U64Array

# Words looked at when pages run out: at most 256 Ki pages, 2 MiB of page numbers.
AHEAD_WORDS = 1 << 12
PENDING_RUNS_MAX = 1 << 20  # 16 bytes each; a guest that floods has its hints applied in between


class RoundSet:
    """Send set, hint accounting and cursor of one round. `index` is 1-based; the set given is not written to."""

    def __init__(self, index: int, candidates: BoolArray | PageBits, hints_allowed: bool) -> None:
        self.index = index
        self.hints_allowed = hints_allowed
        self._candidates = PageBits.of(candidates)
        self._hinted = PageBits(self._candidates.pages)
        self._skipped = PageBits(self._candidates.pages)
        self._pending: list[tuple[U64Array, U64Array]] = []
        self._pending_runs = 0
        self._cursor = 0  # page: all members below are taken or skipped
        self._ahead: U64Array = np.empty(0, np.uint64)  # the next members, and what of them was taken
        self._ahead_at = 0
        self._looked_at = 0  # word: members below are ahead, or behind the cursor
        self._remaining = self._candidates.count
        self._finished = False
        self._ledger = RoundLedger(index=index, candidate_pages=self._remaining)

    @property
    def pages(self) -> int:
        """How many pages the guest has."""
        return self._candidates.pages

    @property
    def ledger(self) -> RoundLedger:
        """The running figures."""
        self._apply()
        return self._ledger

    @property
    def remaining(self) -> int:
        """Candidates that were neither taken nor skipped so far."""
        self._apply()
        return self._remaining

    @property
    def candidates(self) -> BoolArray:
        """The mask (pages,) of the round's set as it was harvested, a copy."""
        return self._candidates.mask()

    @property
    def skipped(self) -> BoolArray:
        """The mask (pages,) of candidates that hints removed so far, a copy."""
        self._apply()
        return self._skipped.mask()

    def hint(self, pfn_first: U64Array, page_count: U32Array | U64Array) -> None:
        """Takes the free ranges of one batch of hints out of what is still to be sent.

        The ranges were checked against the guest's memory by the hint session; they may overlap, repeat and
        come in any order.

        Raises:
            LocalProtocolError: hints are off in this round, the round is over, or a range is out of memory.
        """
        if not self.hints_allowed:
            raise LocalProtocolError("a hint in a round without hints", round_index=self.index)
        self._require_open()
        if pfn_first.size != page_count.size:
            raise LocalProtocolError("runs of unequal lists", first=pfn_first.size, count=page_count.size)
        if not pfn_first.size:
            return
        pages, count = np.uint64(self.pages), page_count.astype(np.uint64)
        # Subtracted, never added: a sum could wrap around 2^64.
        if ((pfn_first > pages) | (count > pages - np.minimum(pfn_first, pages))).any():
            raise LocalProtocolError("run beyond the guest's memory", pages=self.pages)
        self._pending.append((pfn_first.astype(np.uint64), count))
        self._pending_runs += pfn_first.size
        if self._pending_runs > PENDING_RUNS_MAX:
            self._apply()

    def _apply(self) -> None:
        """Books every page that was hinted since the last look and for the first time in this round (rule 5)."""
        if not self._pending:
            return
        first = np.concatenate([first for first, _ in self._pending])
        count = np.concatenate([count for _, count in self._pending])
        self._pending, self._pending_runs = [], 0
        ledger, removed_before = self._ledger, self._ledger.skipped_pages
        hinted_before = ledger.hinted_pages > 0
        for window, cover in covers(first, count, self.pages):
            fresh = cover & ~self._hinted.words[window] if hinted_before else cover
            hinted = popcount(fresh)
            if not hinted:
                continue
            self._hinted.add_words(window, fresh)
            fresh &= self._candidates.words[window]
            in_set = popcount(fresh)
            removed = self._skip(window, fresh, in_set) if in_set else 0
            ledger.hinted_pages += hinted
            ledger.absent_pages += hinted - in_set
            ledger.skipped_pages += removed
            ledger.late_pages += in_set - removed
        removed = ledger.skipped_pages - removed_before
        self._remaining -= removed
        if removed and self._ahead_at < self._ahead.size:
            self._ahead, self._ahead_at = self._ahead[:0], 0
            self._looked_at = self._cursor // WORD_BITS

    def _skip(self, window: slice, members: U64Array, count: int) -> int:
        """Takes those at or above the cursor out of what is to be sent; what is below it can only be late."""
        behind = self._cursor - window.start * WORD_BITS
        if behind > 0:
            whole = min(behind // WORD_BITS, members.size)
            members[:whole] = 0
            if whole < members.size and behind % WORD_BITS:
                members[whole] &= ~np.uint64((1 << behind % WORD_BITS) - 1)
            count = popcount(members)
        self._skipped.add_words(window, members)
        return count

    def take(self, count: int) -> U64Array:
        """The next `count` pages to send, ascending; fewer at the end, none when nothing remains.

        Raises:
            LocalProtocolError: the round is over.
        """
        self._require_open()
        self._apply()
        found: list[U64Array] = []
        wanted = min(count, self._remaining)
        while wanted > 0:
            if self._ahead_at == self._ahead.size:
                self._look_ahead()
            part = self._ahead[self._ahead_at : self._ahead_at + wanted]
            self._ahead_at += part.size
            self._remaining -= part.size
            wanted -= part.size
            found.append(part)
        if not found:
            return self._ahead[:0]
        self._cursor = int(found[-1][-1]) + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _look_ahead(self) -> None:
        """Members from the cursor on; there are some, as something remains."""
        candidates, skipped = self._candidates.words, self._skipped.words
        while True:
            at = self._looked_at
            assert at < candidates.size, "pages remain and none is found"
            self._looked_at = min(at + AHEAD_WORDS, candidates.size)
            portion = candidates[at : self._looked_at] & ~skipped[at : self._looked_at]
            if portion.any():
                found = pages_in(portion, at)
                self._ahead, self._ahead_at = found[found >= np.uint64(self._cursor)], 0
                if self._ahead.size:
                    return

    def record_sent(self, data_pages: int, zero_pages: int, payload_bytes: int) -> None:
        """Books pages that were taken and have gone out, as data or as zero records."""
        self._require_open()
        self._ledger.sent_pages += data_pages
        self._ledger.zero_pages += zero_pages
        self._ledger.payload_bytes += payload_bytes

    def finish(self, dirty: BoolArray | PageBits | None) -> RoundTotals:
        """Ends the round with the harvest that ended it (None: the guest was paused, no harvest).

        Raises:
            LocalProtocolError: pages remain, the books do not balance, or the round was over already.
        """
        self._require_open()
        if self.remaining:
            raise LocalProtocolError(
                "the round is not over", round_index=self.index, remaining=self._remaining
            )
        if dirty is not None and self._ledger.skipped_pages:
            self._ledger.redirtied_pages = self._skipped_and(PageBits.of(dirty))
        totals = self._ledger.freeze()
        self._finished = True
        return totals

    def _skipped_and(self, dirty: PageBits) -> int:
        both = 0
        for start in range(0, dirty.words.size, PORTION_WORDS):
            part = slice(start, start + PORTION_WORDS)
            both += popcount(self._skipped.words[part] & dirty.words[part])
        return both

    def _require_open(self) -> None:
        if self._finished:
            raise LocalProtocolError("the round is over", round_index=self.index)
