"""Do payload, gRPC messages and the wire agree?

Rule 1: they were counted in three places (sender, codec, kernel), and at both ends where the hosts have networks of
        their own; the framing model explains what differs (account.py).
Rule 2: what the model does not explain within 1 % makes the run unknown: a counter lies, or bytes were carried
        that nobody accounts for.
Rule 3: only a completed migration, or a whole rehearsal, is reconciled; a torn connection leaves bytes that
        nobody can place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.analysis.account import account_of
from testbed.checkers.verdict import Finding, unknown, valid

if TYPE_CHECKING:
    from testbed.record.run_record import RunRecord


def check(record: RunRecord) -> Finding:
    """Reconciles the counts."""
    if not record.verified or record.ended is None:
        return valid("the migration did not complete: bytes are reported and not reconciled")
    if record.sender_was_killed:
        return valid("a fault killed the source's node, and its counters with it: nothing to reconcile")
    counted = record.ended.fields["bytes"]
    figures = {name: int(counted.get(name, 0)) for name in ("payload", "grpc", "wire_tx")}
    account = account_of(record)
    if account is None or not account.wire_forward_bytes:
        return unknown("the wire was not counted", **figures)
    figures["unexplained"] = account.unexplained_forward_bytes
    return unknown(*account.problems, **figures) if account.problems else valid(**figures)
