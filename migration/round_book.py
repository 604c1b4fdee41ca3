"""The rounds of one attempt: the one under way, the books of those that ended, and how fast they went.

Rule 1: a batch is taken from the round's set and is outstanding until it was sent, whatever the link does.
Rule 2: pages that go once more because the link was lost are counted apart: they were sent before.
Rule 3: time in which the link was lost is no sending time: the rate is the link's while it worked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migration.commands import Note
from migration.convergence import recent_rate
from migration.handover import NO_TIME
from migration.ledger import MigrationLedger, RoundTotals
from migration.page_bits import PageBits
from migration.round_set import RoundSet
from migration.rounds import Decision, RoundStats

if TYPE_CHECKING:
    from migration.events import HintsReported, PagesSent
    from migration.pages import BoolArray, U64Array

BATCH_PAGES = 4096  # 16 MiB: hints and decisions take effect between batches; smaller ones cost hand-overs


class RoundBook:
    """Instants are in ns, of the clock that the machine is given."""

    def __init__(self, batch_pages: int = BATCH_PAGES) -> None:
        self._batch_pages = batch_pages
        self.ledger = MigrationLedger()
        self.round: RoundSet | None = None  # under way, or the last one
        self.throttle_percent = 0  # in force, as far as the rounds are concerned
        self._round_started_ns = 0
        self._sending_since_ns = 0
        self.batch_outstanding = False  # taken, and not reported sent
        self._payload_bytes: list[int] = []  # per ended round
        self._sending_ns: list[int] = []
        self.samples: list[tuple[float, int]] = []  # (seconds, pages dirtied within) of the rounds that ended
        self.handover = NO_TIME  # as far as it is known
        self._harvest_ordered_ns = 0
        self._remaining: list[int] = []  # per ended round under the throttle in force

    @property
    def round_started_ns(self) -> int:
        """When the round under way began."""
        return self._round_started_ns

    @property
    def current(self) -> RoundSet:
        """The round under way."""
        assert self.round is not None, "no round was opened"
        return self.round

    def open(self, candidates: PageBits, ballooned: PageBits | None, now_ns: int, *, hints: bool) -> Note:
        """Begin the next round with this set, without what rests in the balloon."""
        if ballooned is not None:
            candidates = candidates.minus(ballooned)
        self.round = RoundSet(len(self.ledger.rounds) + 1, candidates, hints_allowed=hints)
        self.round.ledger.ballooned_pages = 0 if ballooned is None else ballooned.count
        self._round_started_ns = self._sending_since_ns = now_ns
        return Note("round_started", {"round": self.round.index, "candidate_pages": self.round.remaining})

    def hint(self, report: HintsReported) -> None:
        """Take what the guest hinted under the open id out of what is still to be sent."""
        self.current.hint(report.pfn_first, report.page_count)
        self.current.ledger.count_stale(report.stale_pages)
        self.current.ledger.count_rejected(report.rejected_ranges)

    def begin_sending(self, now_ns: int) -> None:
        """The first batch goes: what came before was waiting for hints."""
        self._sending_since_ns = now_ns

    def link_was_lost(self, since_ns: int, now_ns: int) -> None:
        """The link worked again at `now_ns`."""
        self._sending_since_ns += now_ns - max(since_ns, min(self._sending_since_ns, now_ns))

    def take(self) -> U64Array:
        """The next batch, ascending; empty when nothing remains."""
        pfns = self.current.take(self._batch_pages)
        self.batch_outstanding = len(pfns) > 0
        return pfns

    def sent(self, sent: PagesSent) -> None:
        """The outstanding batch is out."""
        self.batch_outstanding = False
        self.current.record_sent(sent.data_pages, sent.zero_pages, sent.payload_bytes)

    def resent(self, pages: int) -> None:
        """So many pages go once more: their chunks were lost with the connection."""
        if pages:
            self.current.ledger.resent_pages += pages

    def harvest_ordered(self, now_ns: int) -> None:
        """The harvest that ends the round begins."""
        self._harvest_ordered_ns = now_ns

    def harvested(self, now_ns: int) -> None:
        """It is in: the last one, with the guest paused, will take as long."""
        self.handover = self.handover.harvested((now_ns - self._harvest_ordered_ns) / 1e6)

    def finish(self, dirty: BoolArray | PageBits | None, now_ns: int) -> RoundTotals:
        """End the round with the harvest that ended it (None: the guest was paused, no harvest)."""
        totals = self.current.finish(dirty)
        self.ledger.add(totals)
        self._payload_bytes.append(totals.payload_bytes)
        self._sending_ns.append(max(now_ns - self._sending_since_ns, 1))
        if dirty is not None:
            self.samples.append(((now_ns - self._round_started_ns) / 1e9, PageBits.of(dirty).count))
        return totals

    def stats(self, dirty: BoolArray | PageBits, elapsed_ns: int, *, link_up: bool) -> RoundStats:
        """What the decision after the ended round is made from."""
        return RoundStats(
            index=self.current.index,
            elapsed_ms=elapsed_ns / 1e6,
            remaining_pages=PageBits.of(dirty).count,
            rate_bytes_per_s=recent_rate(self._payload_bytes, self._sending_ns),
            before=tuple(self._remaining),
            throttle_percent=self.throttle_percent,
            link_up=link_up,
            handover=self.handover,
        )

    def decided(self, stats: RoundStats, throttle_percent: int) -> None:
        """Another round comes; under another throttle the comparison begins anew."""
        if throttle_percent != self.throttle_percent:
            self.throttle_percent = throttle_percent
            self._remaining.clear()
        self._remaining.append(stats.remaining_pages)

    def note(self, totals: RoundTotals, dirtied_pages: int, decision: Decision, now_ns: int) -> Note:
        """The line of the history about a round that ended."""
        fields: dict[str, object] = dict(totals.to_dict())
        fields["round"] = fields.pop("index")
        return Note(
            "round_ended",
            {
                **fields,
                "duration_ms": (now_ns - self._round_started_ns) / 1e6,
                "dirtied_pages": dirtied_pages,
                "throttle_percent": self.throttle_percent,
                "decision": decision.kind.name.lower(),
                "reason": decision.reason,
                "downtime_ms_estimated": decision.downtime_ms_estimated,
            },
        )
