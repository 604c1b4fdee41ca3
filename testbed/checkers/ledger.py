"""Do the hint ledger's sums balance?

Rule 1: every hinted page was skipped, or came late, or was not in the round's set; per round and in total.
Rule 2: a re-dirtied page was skipped before, so there are never more of them.
Rule 3: what the ledger says was skipped is what the rounds say was skipped; nothing is skipped unasked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.checkers.verdict import Finding, invalid, unknown, valid

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from testbed.record.run_record import RunRecord

TOTALS = ("hinted_pages", "skipped_pages", "late_pages", "absent_pages", "redirtied_pages")


def check(record: RunRecord) -> Finding:
    """Adds the ledger up again."""
    if record.ended is None:
        return valid("no migration ended: there is no ledger")
    hints: Mapping[str, Any] | None = record.ended.fields.get("hints")
    if hints is None:
        return unknown("the source reported no hint ledger")
    skipped = int(hints["skipped_pages"])
    if skipped and not record.scenario.migration.hints:
        return invalid(f"{skipped} pages were skipped although skip = '{record.scenario.migration.skip}'")
    reasons = [*_rounds(hints["rounds"]), *_totals(hints), *_against_rounds(record, hints)]
    figures = {name: int(hints.get(name, 0)) for name in TOTALS}
    return unknown(*reasons, **figures) if reasons else valid(**figures)


def _rounds(rounds: list[Mapping[str, int]]) -> Iterator[str]:
    for entry in rounds:
        parts = [entry[name] for name in ("skipped_pages", "late_pages", "absent_pages")]
        if entry["hinted_pages"] != sum(parts):
            sums = " + ".join(str(part) for part in parts)
            yield f"round {entry['index']}: {entry['hinted_pages']} hinted pages are not {sums}"
        if entry["redirtied_pages"] > entry["skipped_pages"]:
            yield (
                f"round {entry['index']}: {entry['redirtied_pages']} pages re-dirtied "
                f"of {entry['skipped_pages']} skipped"
            )


def _totals(hints: Mapping[str, Any]) -> Iterator[str]:
    for name in TOTALS:
        total = sum(entry[name] for entry in hints["rounds"])
        if name in hints and hints[name] != total:
            yield f"{name} is {hints[name]} and the rounds add up to {total}"


def _against_rounds(record: RunRecord, hints: Mapping[str, Any]) -> Iterator[str]:
    told = {event.fields["round"]: event.fields["skipped_pages"] for event in record.rounds}
    for entry in hints["rounds"]:
        index = entry["index"]
        if index in told and told[index] != entry["skipped_pages"]:
            yield f"round {index} skipped {told[index]} pages and its ledger says {entry['skipped_pages']}"
