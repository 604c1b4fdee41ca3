"""One scenario in several variants, several times each.

Rule 1: repeats are interleaved (every variant once, then all again), so that a machine that gets slower or
        faster on the way is unfair to all variants alike.
Rule 2: repeat number i of every variant runs with the same seed, the scenario's own plus i.
Rule 3: figures are medians with their range; a run that did not complete gives no figures and is counted.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from testbed.errors import UsageError
from testbed.machine import require
from testbed.run import FinishedRun, run_scenario
from testbed.scenario_file import load, split_override
from testbed.verdict import Verdict, worst

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from testbed.interrupt import Interrupt
    from testbed.progress import Display
    from testbed.result import Result
    from testbed.scenario import Scenario

VARIANTS_MAX: Final = 64  # a slip in --vary must not start a day of runs
REPEATS_MAX: Final = 100  # a slip must not start a day of runs

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
        """For a table."""
        if self.median is None or self.least is None or self.most is None:
            return "-"
        if self.least == self.most:
            return formatted(self.median)
        return f"{formatted(self.median)}\n{formatted(self.least)} .. {formatted(self.most)}"


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


def variants(path: Path, vary: Sequence[str], fixed: Sequence[str]) -> dict[str, list[str]]:
    """Every combination of the varied values, as overrides by the variant's label.

    Raises UsageError with every problem of every variant.
    """
    axes = [_axis(text) for text in vary]
    combinations = [list(overrides) for overrides in itertools.product(*axes)]
    if len(combinations) > VARIANTS_MAX:
        raise UsageError(f"--vary makes {len(combinations)} variants; at most {VARIANTS_MAX} are run")
    problems: list[str] = []
    for overrides in combinations:
        try:
            load(path, overrides, fixed)
        except UsageError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UsageError(*problems)
    return {", ".join(_short(text) for text in overrides): overrides for overrides in combinations}


def run_variants(
    path: Path,
    chosen: Mapping[str, list[str]],
    fixed: Sequence[str],
    repeats: int,
    *,
    out: Path,
    interrupt: Interrupt,
    shown: Display,
) -> dict[str, list[FinishedRun]]:
    """Runs every variant `repeats` times, interleaved. Raises MachineCannotError before the first one."""
    first = {label: load(path, overrides, fixed) for label, overrides in chosen.items()}
    for scenario in first.values():
        require(scenario)
    finished: dict[str, list[FinishedRun]] = {label: [] for label in chosen}
    for repeat in range(repeats):
        for label, scenario in first.items():
            if interrupt.pressed:
                return finished
            seeded: Scenario = scenario.model_copy(update={"seed": scenario.seed + repeat})
            shown_as = f"{label} #{repeat + 1}"
            run = run_scenario(seeded, out, interrupt, shown.begin(shown_as))
            shown.finish(shown_as, run)
            finished[label].append(run)
    return finished


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


def _axis(text: str) -> list[str]:
    key, separator, values = text.partition("=")
    parts = [value.strip() for value in values.split(",")]
    if not separator or not all(parts):
        raise UsageError(f"--vary: '{text}' is not key=value,value as in migration.skip=none,hint")
    if len(set(parts)) != len(parts):
        raise UsageError(f"--vary: '{text}' names a value twice")
    overrides = [f"{key}={value}" for value in parts]
    split_override(overrides[0])
    return overrides


def _short(override: str) -> str:
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]} {value}"
