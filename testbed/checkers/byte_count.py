"""Do payload, gRPC messages and the wire agree?

Rule 1: they were counted in three places (sender, codec, kernel); the framing model explains what differs.
Rule 2: what the model does not explain within its tolerance makes the run unknown: a counter lies, or bytes
        were carried that nobody accounts for.
Rule 3: only a completed migration, or a whole rehearsal, is reconciled; a torn connection leaves bytes that
        nobody can place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.framing import message_bounds, wire_bounds
from testbed.units import PAGE_BYTES
from testbed.verdict import Finding, unknown, valid

if TYPE_CHECKING:
    from testbed.record import RunRecord


def check(record: RunRecord) -> Finding:
    """Reconciles the three counts."""
    if not record.verified or record.ended is None:
        return valid("the migration did not complete: bytes are reported and not reconciled")
    counted = record.ended.fields["bytes"]
    payload, grpc, wire = int(counted["payload"]), int(counted["grpc"]), int(counted["wire_tx"])
    rounds = [event.fields for event in record.all("round_ended", "source")]
    data_pages, zero_pages = payload // PAGE_BYTES, sum(int(entry["zero_pages"]) for entry in rounds)
    reasons = []
    if not wire:
        reasons.append("the wire was not counted")
    messages = message_bounds(data_pages, zero_pages, PAGE_BYTES, len(rounds))
    if messages.excess(grpc):
        reasons.append(
            f"{payload} bytes of payload make {messages.least} to {messages.most} bytes of messages, "
            f"counted {grpc}"
        )
    stream = wire_bounds(grpc, data_pages, zero_pages, len(rounds))
    if wire and stream.excess(wire):
        reasons.append(
            f"{grpc} bytes of messages make {stream.least} to {stream.most} bytes on the wire, counted {wire}"
        )
    figures = {"payload": payload, "grpc": grpc, "wire_tx": wire}
    return unknown(*reasons, **figures) if reasons else valid(**figures)
