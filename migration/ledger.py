"""What became of the guest's hints and of the pages of each round.

Rule 1: pages are counted as bits that changed, so a page hinted twice in a round counts once.
Rule 2: every hinted page of a round was either skipped, or late, or not in the round's set (absent).
Rule 3: every candidate page of a round was either sent as data, or sent as a zero record, or skipped. A page
        whose chunk was lost with the connection goes once more: it is counted apart, as resent.
Rule 4: a round whose sums do not balance is a bug on this side and is never reported as a result.
Rule 5: a page re-dirtied was skipped in its round and is in the harvest that ended the round; it stays
        counted as skipped, because that round did not send it.
"""

from dataclasses import asdict, dataclass, field

from migration.errors import LocalProtocolError


@dataclass(frozen=True, slots=True)
class RoundTotals:
    """The balanced figures of one finished round. All are pages unless their name says otherwise."""

    index: int
    candidate_pages: int
    sent_pages: int
    zero_pages: int
    hinted_pages: int
    skipped_pages: int
    late_pages: int
    absent_pages: int
    redirtied_pages: int
    stale_pages: int
    rejected_ranges: int
    payload_bytes: int
    ballooned_pages: int = 0
    resent_pages: int = 0

    def to_dict(self) -> dict[str, int]:
        """The entry of this round in the result document's `hints.rounds`."""
        return asdict(self)


@dataclass(slots=True)
class RoundLedger:
    """The running figures of one round; `freeze` turns them into RoundTotals."""

    index: int
    candidate_pages: int
    sent_pages: int = 0  # as data
    zero_pages: int = 0  # as zero records
    hinted_pages: int = 0  # distinct pages that valid hints named
    skipped_pages: int = 0  # hinted, a candidate, and not taken yet: removed and not sent in this round
    late_pages: int = 0  # hinted, a candidate, but already taken for sending
    absent_pages: int = 0  # hinted, but not in this round's set
    redirtied_pages: int = 0  # skipped, and dirty in the harvest that ended the round
    stale_pages: int = 0  # hinted under another command id: ignored
    rejected_ranges: int = 0  # not a range of this guest's memory: ignored
    payload_bytes: int = 0
    ballooned_pages: int = 0  # not candidates of this round, because they are in the balloon
    resent_pages: int = 0  # once more, because their chunks were lost with the connection; in no sum

    def count_stale(self, pages: int) -> None:
        """Counts pages hinted under another command id."""
        self.stale_pages += pages

    def count_rejected(self, ranges: int = 1) -> None:
        """Counts ranges that are none of this guest's memory."""
        self.rejected_ranges += ranges

    def balance(self) -> None:
        """Checks rules 2 and 3.

        Raises:
            LocalProtocolError: with all figures, when a sum is wrong.
        """
        hints_agree = self.hinted_pages == self.skipped_pages + self.late_pages + self.absent_pages
        pages_agree = self.candidate_pages == self.sent_pages + self.zero_pages + self.skipped_pages
        subset = self.redirtied_pages <= self.skipped_pages
        if not (hints_agree and pages_agree and subset):
            raise LocalProtocolError("the round's ledger does not balance", **asdict(self))

    def freeze(self) -> RoundTotals:
        """The final figures.

        Raises:
            LocalProtocolError: when they do not balance.
        """
        self.balance()
        return RoundTotals(**asdict(self))


@dataclass(slots=True)
class MigrationLedger:
    """The rounds of one attempt, added up.

    Stale hints and rejected ranges also arrive between rounds and after the last one; they are counted here.
    """

    rounds: list[RoundTotals] = field(default_factory=list)
    stale_pages_between: int = 0
    rejected_ranges_between: int = 0

    def add(self, totals: RoundTotals) -> None:
        """Takes in a finished round.

        Raises:
            LocalProtocolError: rounds do not come in ascending order.
        """
        if self.rounds and totals.index <= self.rounds[-1].index:
            raise LocalProtocolError("round out of order", index=totals.index, last=self.rounds[-1].index)
        self.rounds.append(totals)

    def count_stale(self, pages: int) -> None:
        """Counts pages hinted under another command id while no round is open."""
        self.stale_pages_between += pages

    def count_rejected(self, ranges: int = 1) -> None:
        """Counts bad ranges that came while no round is open."""
        self.rejected_ranges_between += ranges

    @property
    def sent_pages(self) -> int:
        """Data pages over all rounds."""
        return sum(totals.sent_pages for totals in self.rounds)

    @property
    def zero_pages(self) -> int:
        """Zero records over all rounds, in pages."""
        return sum(totals.zero_pages for totals in self.rounds)

    @property
    def skipped_pages(self) -> int:
        """Skipped pages over all rounds; a page skipped in two rounds counts twice."""
        return sum(totals.skipped_pages for totals in self.rounds)

    @property
    def resent_pages(self) -> int:
        """Pages sent once more over all rounds."""
        return sum(totals.resent_pages for totals in self.rounds)

    @property
    def payload_bytes(self) -> int:
        """Page payload over all rounds."""
        return sum(totals.payload_bytes for totals in self.rounds)

    def to_dict(self) -> dict[str, int | list[dict[str, int]]]:
        """The result document's `hints`."""
        return {
            "hinted_pages": sum(totals.hinted_pages for totals in self.rounds),
            "skipped_pages": self.skipped_pages,
            "late_pages": sum(totals.late_pages for totals in self.rounds),
            "absent_pages": sum(totals.absent_pages for totals in self.rounds),
            "redirtied_pages": sum(totals.redirtied_pages for totals in self.rounds),
            "stale_pages": self.stale_pages_between + sum(totals.stale_pages for totals in self.rounds),
            "rejected_ranges": self.rejected_ranges_between
            + sum(totals.rejected_ranges for totals in self.rounds),
            "rounds": [totals.to_dict() for totals in self.rounds],
        }
