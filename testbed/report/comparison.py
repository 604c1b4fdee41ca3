"""The runs of one variant of a scenario, summed up.

Rule 1: figures are medians with their range; a run that did not complete gives no figures and is counted.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from testbed.checkers.verdict import Verdict, worst

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.report.result import Result

FIGURES: Final[Mapping[str, Callable[[Result], float | None]]] = {
    "payload_bytes": lambda result: result.bytes.payload,
    "wire_tx_bytes": lambda result: result.bytes.wire_tx,
    "total_ms": lambda result: result.total_ms,
    "downtime_ms": lambda result: result.downtime_ms,
    "guest_blackout_ms": lambda result: result.guest_blackout_ms,
    "skipped_pages": lambda result: result.hints.skipped_pages,
    "rounds": lambda result: len(result.rounds),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """Median and range of one quantity; all None when no run gave it."""

    median: float | None
    least: float | None
    most: float | None

    def text(self, formatted: Callable[[float], str]) -> str:
        """For a table: three lines, or one where all runs gave the same."""
        if self.median is None or self.least is None or self.most is None:
            return "-"
        if self.least == self.most:
            return formatted(self.median)
        return "\n".join(formatted(value) for value in (self.median, self.least, self.most))


@dataclass(frozen=True, slots=True)
class Summary:
    """One variant's runs, summed up."""

    figures: Mapping[str, Figure]
    verdicts: tuple[str, ...]

    @property
    def worst_verdict(self) -> str:
        """The heaviest verdict among the runs."""
        return worst(Verdict(verdict) for verdict in self.verdicts).value

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        figures = {
            name: {"median": figure.median, "min": figure.least, "max": figure.most}
            for name, figure in self.figures.items()
        }
        return {"runs": len(self.verdicts), "verdicts": list(self.verdicts), **figures}


def summarise(results: Sequence[Result]) -> Summary:
    """Medians and ranges over the completed runs."""
    completed = [result for result in results if result.outcome == "completed"]
    figures = {name: _figure([read(result) for result in completed]) for name, read in FIGURES.items()}
    return Summary(figures, tuple(result.verdict for result in results))


def _figure(values: Sequence[float | None]) -> Figure:
    known = [value for value in values if value is not None]
    if not known:
        return Figure(None, None, None)
    return Figure(statistics.median(known), min(known), max(known))
