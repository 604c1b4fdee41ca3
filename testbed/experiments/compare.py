"""One scenario in several variants, several times each.

Rule 1: repeats are interleaved (every variant once, then all again), so that a machine that gets slower or
        faster on the way is unfair to all variants alike.
Rule 2: repeat number i of every variant runs with the same seed, the scenario's own plus i.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from testbed.errors import UsageError
from testbed.machine.capabilities import require
from testbed.run.runner import FinishedRun, run_scenario
from testbed.scenario.file import load, split_override

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from testbed.interrupt import Interrupt
    from testbed.run.progress import Display
    from testbed.scenario.document import Scenario

VARIANTS_MAX: Final = 64  # a slip in --vary must not start a day of runs


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
