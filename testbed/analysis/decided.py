"""What was decided in a migration, what a lost link and a throttle cost, and whether another attempt is worth it.

Rule 1: all of it is read from the record; a field that an older record lacks has its default.
Rule 2: a decision is one line: the source's word after every round, and what it did at a limit or a loss, in order.
Rule 3: a migration is tried again only when the link or the destination was lost: what this host, a limit or a
        person decided would be decided again.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from testbed.documents import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.history import Event
    from testbed.record.run_record import RunRecord

CAUSES_TO_RETRY: Final = frozenset({"link", "destination"})
_WORDS: Final = {"link_lost": "reconnect", "link_restored": "go_on"}


class DecisionPart(Part):
    """One decision; `round` is the round that had ended, null between rounds."""

    at_ms: float  # since the attempt was asked for
    decision: str
    reason: str
    round: int | None = None


class RecoveriesPart(Part):
    """Lost connections that came back."""

    count: int = 0
    paused_ms: float = 0.0
    resent_pages: int = 0


class ThrottlePart(Part):
    """Auto-converge, and what it cost the guest: what it did under it against its own pace before it."""

    steps: list[dict[str, float]] = Field(default_factory=list)
    maximum_percent: int = 0
    throttled_ms: float = 0.0
    operations: int = 0
    operations_expected: int = 0
    cpu_seconds: float = 0.0
    cpu_seconds_expected: float = 0.0


def decisions_of(record: RunRecord) -> list[DecisionPart]:
    """In the order in which they were made, of the last attempt."""
    requested_ns = record.attempt_begins_ns
    made = []
    for event in record.events:
        if event.origin != "source" or event.at_ns < requested_ns:
            continue
        if event.name not in ("round_ended", "decision", *_WORDS):
            continue
        fields = event.fields
        if "decision" not in fields and event.name not in _WORDS:
            continue
        made.append(
            DecisionPart(
                at_ms=round((event.at_ns - requested_ns) / 1e6, 3),
                decision=str(fields.get("decision") or _WORDS[event.name]),
                reason=str(fields.get("reason") or _restored(fields)),
                round=fields.get("round") if event.name == "round_ended" else None,
            )
        )
    return made


def _restored(fields: Mapping[str, Any]) -> str:
    paused_ms, resent = fields.get("paused_ms", 0.0), fields.get("resent_pages", 0)
    return f"the link is back after {paused_ms:.0f} ms, {resent:,} pages go again"


class AttemptPart(Part):
    """An attempt that was made again: what it cost the guest is in no figure of the last one."""

    outcome: str
    reason: str
    total_ms: float = 0.0
    downtime_ms: float = 0.0
    recoveries: RecoveriesPart = RecoveriesPart()
    throttle: ThrottlePart = ThrottlePart()


def earlier_attempts_of(record: RunRecord) -> list[AttemptPart]:
    """Of all attempts but the last, in order; one whose end nobody told is called "unknown"."""
    requests = list(record.all("migration_requested", "testbed"))
    ends = sorted(record.all("migration_ended", "source"), key=lambda event: event.at_ns)
    parts = []
    for asked, following in pairwise(requests):
        told = [event.fields for event in ends if asked.at_ns <= event.at_ns < following.at_ns]
        fields = told[-1] if told else {"outcome": "unknown", "reason": "nobody told its end"}
        parts.append(
            AttemptPart.model_validate(
                {
                    **known(AttemptPart, fields),
                    "recoveries": known(RecoveriesPart, fields.get("recoveries")),
                    "throttle": known(ThrottlePart, fields.get("throttle")),
                }
            )
        )
    return parts


def known(part: type[Part], fields: Any) -> dict[str, Any]:
    """Only what the document declares: nodes may tell more than it promises."""
    return {key: fields[key] for key in part.model_fields if fields and key in fields}


def worth_another_attempt(ended: Event) -> bool:
    """Whether the attempt that ended so may go better when it is made again."""
    return str(ended.fields.get("cause", "")) in CAUSES_TO_RETRY
