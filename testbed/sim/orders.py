"""What an operator orders, what Prepare carries, and how events and orders read in a transcript."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from migration.page_bits import PageBits

if TYPE_CHECKING:
    from migration import events as told
    from migration.identity import AttemptKey
    from source_node.packer import PackingOrder


@dataclass(frozen=True, slots=True)
class Prepare:
    """What Prepare carries."""

    key: AttemptKey
    incarnation: str
    image_digest: int
    vcpu_state: bytes
    device: bytes
    chunks: int
    rehearsal: bool


@dataclass(frozen=True, slots=True)
class Order:
    """What the operator asked for."""

    key: AttemptKey
    skip: told.Skip
    limits: Any
    integrity: str
    hint_wait_ms: int
    rehearsal: bool
    streams: int
    packing: PackingOrder
    handover_ms: float = 0.0


def in_a_line(what: Any) -> str:
    """One line about an event or an order."""
    parts = []
    for name in getattr(what, "__slots__", ()):
        value = getattr(what, name)
        if isinstance(value, PageBits):
            value = f"{value.count} pages"
        elif hasattr(value, "dtype"):
            value = f"{int(value.sum())} set" if value.dtype == bool else f"[{len(value)}]"
        elif isinstance(value, dict):
            continue
        parts.append(f"{name}={getattr(value, 'name', value)}")
    return f"{type(what).__name__}({', '.join(parts)})"
