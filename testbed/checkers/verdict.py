"""Three-valued verdicts, and how those of several checkers become one.

Rule 1: invalid outweighs unknown, unknown outweighs valid.
Rule 2: what could not be judged is unknown, with the reason; it never passes for valid.
Rule 3: an invalid or unknown verdict carries at least one reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Verdict(Enum):
    """What the evidence says."""

    VALID = "valid"
    UNKNOWN = "unknown"
    INVALID = "invalid"


_WEIGHT = {Verdict.VALID: 0, Verdict.UNKNOWN: 1, Verdict.INVALID: 2}
REASONS_MAX = 20  # of one checker: a broken run must not drown its own explanation


@dataclass(frozen=True, slots=True)
class Finding:
    """What one checker says: its verdict, why, what it counted, and remarks that change nothing."""

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.verdict is Verdict.VALID or self.reasons, "a verdict against the run needs a reason"

    def to_dict(self) -> dict[str, object]:
        """The entry of this checker in verdict.json."""
        return {
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "figures": dict(self.figures),
            "notes": list(self.notes),
        }


def valid(*notes: str, **figures: float) -> Finding:
    """Nothing speaks against the run."""
    return Finding(Verdict.VALID, figures=figures, notes=notes)


def unknown(*reasons: str, **figures: float) -> Finding:
    """The evidence is missing or contradicts itself."""
    return Finding(Verdict.UNKNOWN, _bounded(reasons), figures)


def invalid(*reasons: str, **figures: float) -> Finding:
    """The run broke a promise."""
    return Finding(Verdict.INVALID, _bounded(reasons), figures)


def judged(reasons: Iterable[str], **figures: float) -> Finding:
    """Invalid when there are reasons, valid otherwise."""
    found = tuple(reasons)
    return invalid(*found, **figures) if found else valid(**figures)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The heaviest of them; valid when there are none."""
    return max(verdicts, key=_WEIGHT.__getitem__, default=Verdict.VALID)


def _bounded(reasons: tuple[str, ...]) -> tuple[str, ...]:
    if len(reasons) <= REASONS_MAX:
        return reasons
    return (*reasons[:REASONS_MAX], f"and {len(reasons) - REASONS_MAX} more")
