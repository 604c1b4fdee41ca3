"""What the testbed asked the source for, after it was checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migration.events import Skip
    from migration.identity import AttemptKey
    from migration.rounds import Limits


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for, checked."""

    key: AttemptKey
    dest_address: str
    skip: Skip
    tracker: str
    tracker_reason: str
    integrity: str
    hint_wait_ms: int
    limits: Limits
    rehearsal: bool = False
    unsafe_clear_dirty_log_at_hint: bool = False  # source_node/hint_rule.py
