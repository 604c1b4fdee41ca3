"""Do the rounds tell one story?

Rule 1: rounds are numbered from 1 without a gap, and no round has more pages than the guest.
Rule 2: a candidate page was sent as data, or as a zero record, or skipped.
Rule 3: payload is data pages times the page size, and the rounds add up to the migration.
Rule 4: pages that went again after a lost link are in no sum, and there are such only where a link came back.
Rule 5: zero records appear only where zero pages are skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from testbed.checkers.verdict import Finding, invalid, unknown, valid
from testbed.units import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from testbed.record.run_record import RunRecord


def check(record: RunRecord) -> Finding:
    """Adds the rounds up again."""
    if record.ended is None:
        return valid("no migration ended: there are no rounds to judge")
    rounds = [event.fields for event in record.rounds]
    zero_pages = sum(entry["zero_pages"] for entry in rounds)
    if zero_pages and record.scenario.migration.skip in ("none", "hint"):
        return invalid(
            f"{zero_pages} zero records were sent although skip = '{record.scenario.migration.skip}'"
        )
    reasons = [*_numbering(rounds, record), *_sums(rounds, record.pages), *_payload(rounds, record)]
    figures = {"rounds": len(rounds), "sent_pages": sum(entry["sent_pages"] for entry in rounds)}
    return unknown(*reasons, **figures) if reasons else valid(**figures)


def _numbering(rounds: list[Mapping[str, Any]], record: RunRecord) -> Iterator[str]:
    indices = [entry["round"] for entry in rounds]
    if indices != list(range(1, len(rounds) + 1)):
        yield f"the rounds are numbered {indices}"
    if record.verified and not rounds:
        yield "the migration completed without a round"
    limit = record.scenario.migration.rounds_max
    # The stop-and-copy round comes after the last pre-copy round; a link that was lost at the last one costs one.
    recoveries = _recoveries(record)
    if len(rounds) > limit + 1 + recoveries["count"]:
        yield f"{len(rounds)} rounds although rounds_max = {limit}"
    resent = sum(entry.get("resent_pages", 0) for entry in rounds)
    if resent and not recoveries["count"]:
        yield f"{resent} pages were sent again and no link was lost"
    if record.verified and resent != recoveries["resent_pages"]:
        yield f"the rounds sent {resent} pages again and the migration says {recoveries['resent_pages']}"


def _recoveries(record: RunRecord) -> dict[str, int]:
    told = record.ended.fields.get("recoveries") or {} if record.ended is not None else {}
    return {name: int(told.get(name, 0)) for name in ("count", "resent_pages")}


def _sums(rounds: list[Mapping[str, Any]], pages: int) -> Iterator[str]:
    for entry in rounds:
        parts = [entry[name] for name in ("sent_pages", "zero_pages", "skipped_pages")]
        if entry["candidate_pages"] != sum(parts):
            sums = " + ".join(str(part) for part in parts)
            yield f"round {entry['round']}: {entry['candidate_pages']} candidate pages are not {sums}"
        if max(entry["candidate_pages"], entry["dirtied_pages"]) > pages:
            yield f"round {entry['round']} has more pages than the guest's {pages}"
        if entry["payload_bytes"] != entry["sent_pages"] * PAGE_BYTES:
            yield (
                f"round {entry['round']}: {entry['sent_pages']} data pages are not "
                f"{entry['payload_bytes']} bytes of payload"
            )


def _payload(rounds: list[Mapping[str, Any]], record: RunRecord) -> Iterator[str]:
    # A round that was cut short has no end and no figures, and a process that was killed has no sums.
    if not record.verified or record.ended is None or record.sender_was_killed:
        return
    total, told = sum(entry["payload_bytes"] for entry in rounds), record.ended.fields["bytes"]["payload"]
    if total != told:
        yield f"the rounds carried {total} bytes of payload and the migration says {told}"
