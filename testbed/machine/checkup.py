"""One line of `ballast doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Checkup:
    """One capability."""

    name: str
    ok: bool
    required: bool
    found: str
    needed_for: str
    remedy: str = ""
