"""Did exactly one host run the guest, at every moment and in the end?

Rule 1: judged from the agents' own beats, in files that no fault touches; what nodes claim is compared.
Rule 2: two hosts never beat at the same time, and no epoch is ever beaten on two hosts.
Rule 3: epochs grow with time; the host that takes over continues with the next one.
Rule 4: in the end the guest beats where the outcome says it is, and only there.
Rule 5: what is missing proves nothing: a host that must have run the guest and left no beats, or whose last state
        was not recorded, makes the verdict unknown. A guest is lost only when its agent's process is known to
        have ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np

from testbed.checkers.verdict import Finding, invalid, unknown, valid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.record.beats import BeatArray
    from testbed.record.run_record import RunRecord

RUNS_OR_COULD = ("running", "paused")  # states in which an agent holds a guest that may go on


@dataclass(frozen=True, slots=True)
class Span:
    """A host beat one epoch from `first_ns` to `last_ns`."""

    host: str
    epoch: int
    first_ns: int
    last_ns: int


def check(record: RunRecord) -> Finding:
    """Looks at the spans in which each host ran the guest."""
    spans = sorted(
        (span for host, beats in record.beats.items() for span in spans_of(host, beats)),
        key=lambda span: span.first_ns,
    )
    reasons = [*_overlaps(spans), *_disorder(spans)]
    if reasons:
        return invalid(*reasons)
    if record.last("migration_requested", "testbed") is None:
        return valid("no migration was begun")
    if record.ended is None:
        return unknown("nobody reported an outcome: who owns the guest cannot be told from this record")
    return _in_the_end(record, spans)


def check_chain(record: RunRecord) -> Finding:
    """Of a run with legs: the spans of all hosts over all legs; each leg's end is judged with the leg."""
    spans = sorted(
        (span for host, beats in record.beats.items() for span in spans_of(host, beats)),
        key=lambda span: span.first_ns,
    )
    reasons = [*_overlaps(spans), *_disorder(spans)]
    return invalid(*reasons) if reasons else valid()


def spans_of(host: str, beats: BeatArray) -> Iterator[Span]:
    """The epochs that one host beat, in the order of their numbers."""
    for epoch in np.unique(beats["guest_epoch"]):
        at_ns = beats["at_ns"][beats["guest_epoch"] == epoch]
        yield Span(host, int(epoch), int(at_ns.min()), int(at_ns.max()))


def _overlaps(spans: list[Span]) -> Iterator[str]:
    for one, other in combinations(spans, 2):
        if one.host == other.host:
            continue
        shared_ns = min(one.last_ns, other.last_ns) - max(one.first_ns, other.first_ns)
        if shared_ns >= 0:
            yield f"{one.host} and {other.host} both ran the guest for {shared_ns / 1e6:.3f} ms"


def _disorder(spans: list[Span]) -> Iterator[str]:
    for earlier, later in pairwise(spans):
        if later.epoch < earlier.epoch:
            yield f"epoch {later.epoch} ran at the {later.host} after epoch {earlier.epoch} had begun"
        elif later.host != earlier.host and later.epoch != earlier.epoch + 1:
            wanted = earlier.epoch + 1
            yield f"the {later.host} took over epoch {earlier.epoch} as {later.epoch}, not as {wanted}"


def _in_the_end(record: RunRecord, spans: list[Span]) -> Finding:  # noqa: PLR0911 - one a finding
    assert record.ended is not None
    outcome = record.outcome
    if record.scenario.guest.kind == "ballast" and not len(record.beats["source"]):
        return unknown("the source left no beats, and the guest must have run there")
    broken = record.last("run_broken")
    if broken is not None:
        return unknown(f"the run broke after the outcome: {broken.fields.get('reason', '')}")
    ran_at_dest = any(span.host == "dest" for span in spans)
    if outcome == "guest_lost":
        return _lost(record)
    if outcome != "completed":
        if ran_at_dest:
            return invalid(f"the outcome is '{outcome}' and the guest ran at the destination")
        beats = record.beats["source"]
        if not len(beats) or beats["at_ns"][-1] <= record.ended.at_ns:
            return invalid(f"the outcome is '{outcome}' and the guest did not go on at the source")
    elif not ran_at_dest:
        if record.last("guest_running", "dest") is None:
            return unknown("the record ends before the guest ran at the destination")
        return invalid("the guest was handed over and never beat at the destination")
    return _claims(record, "dest" if outcome == "completed" else "source")


def _lost(record: RunRecord) -> Finding:
    ended = [
        event
        for event in record.all("process_ended")
        if str(event.fields["process"]).endswith("-agent") and not event.fields.get("asked")
    ]
    if not ended:
        return invalid("the guest was called lost, and no agent's process ended by itself")
    if any(len(beats) and beats["at_ns"][-1] > ended[0].at_ns for beats in record.beats.values()):
        return invalid("the guest was called lost and went on beating")
    return valid("the guest was lost with its agent")


def _claims(record: RunRecord, owner: str) -> Finding:
    states = {str(event.fields["host"]): str(event.fields["state"]) for event in record.all("final_status")}
    holders = [host for host, state in states.items() if state in RUNS_OR_COULD]
    for host in ("source", "dest"):
        if host not in states:
            return unknown(f"the {host}'s last state was not recorded")
    if holders != [owner]:
        found = ", ".join(f"{host} {state}" for host, state in states.items())
        return invalid(f"the {owner} must hold the guest alone in the end, found: {found}")
    return valid()
