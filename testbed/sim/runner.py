"""Many seeds over all cores: counted, timed, and every failure made small.

Rule 1: a worker gets a range of seeds and sends back counts; only failing worlds cross whole.
Rule 2: what a seed does depends on the seed alone, so that its failure is played again anywhere.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from testbed.sim import coverage
from testbed.sim.minimise import minimised
from testbed.sim.plants import Plant
from testbed.sim.simulation import Outcome, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK_SEEDS = 20
COLLECT_SEEDS = 5
VIOLATIONS_MAX = 10  # made small and told whole; the rest is only counted


@dataclass(slots=True)
class Part:
    """What one worker found in its range."""

    seeds: int = 0
    steps: list[int] = field(default_factory=list)
    coverage: Counter[str] = field(default_factory=Counter)
    failing: list[Outcome] = field(default_factory=list)


@dataclass(slots=True)
class Summary:
    """A finished run over many seeds."""

    plant: Plant
    seeds: int
    seconds: float
    steps: list[int]
    coverage: dict[str, dict[str, int]]
    failing: list[Outcome]
    smallest: list[Outcome]

    @property
    def unreached(self) -> list[str]:
        """What no world reached."""
        return coverage.unreached(self.coverage)

    def to_dict(self) -> dict[str, Any]:
        """The document of `ballast sim --json`."""
        ordered = sorted(self.steps)
        return {
            "schema": 1,
            "plant": self.plant.value,
            "seeds": self.seeds,
            "violations": [violation(outcome) for outcome in self.smallest],
            "violations_count": len(self.failing),
            "seconds": round(self.seconds, 3),
            "seeds_per_second": round(self.seeds / max(self.seconds, 1e-9), 1),
            "steps": sum(self.steps),
            "steps_median": ordered[len(ordered) // 2] if ordered else 0,
            "coverage": self.coverage,
            "unreached": self.unreached,
        }


def violation(outcome: Outcome) -> dict[str, Any]:
    """A failing world for JSON."""
    options = outcome.options
    return {
        "seed": outcome.seed,
        "violation": outcome.violation,
        "steps": outcome.steps,
        "options": {
            name: getattr(options, name) for name in options.__dataclass_fields__ if name != "faults"
        },
        "schedule": [fault.to_dict() for fault in options.faults],
        "transcript": outcome.transcript,
    }


def run_range(task: tuple[int, int, Plant]) -> Part:
    """One worker's work: `count` seeds from `first`."""
    first, count, plant = task
    part = Part()
    # A world is a few thousand objects that know each other: collected between worlds, and not within. What was
    # there before, modules above all, is not looked through every time.
    gc.disable()
    gc.collect()
    gc.freeze()
    for seed in range(first, first + count):
        if seed % COLLECT_SEEDS == 0:
            gc.collect()
        outcome = simulate(seed, plant)
        part.seeds += 1
        part.steps.append(outcome.steps)
        part.coverage += outcome.coverage
        if outcome.violation:
            part.failing.append(outcome)
    return part


def run_seeds(
    first: int,
    count: int,
    plant: Plant,
    told: Callable[[int, int], None],
    *,
    processes: int = 0,
    stop_at_first: bool = False,
) -> Summary:
    """Runs the seeds; `told` hears of (seeds done, violations so far).

    `processes` is how many workers, 0 one a core; with `stop_at_first` a violation ends it, as for a planted bug.
    """
    started, total = time.monotonic(), Part()
    tasks = [
        (start, min(CHUNK_SEEDS, first + count - start), plant)
        for start in range(first, first + count, CHUNK_SEEDS)
    ]
    for part in _parts(tasks, processes or os.cpu_count() or 1):
        total.seeds += part.seeds
        total.steps += part.steps
        total.coverage += part.coverage
        total.failing += part.failing
        told(total.seeds, len(total.failing))
        if stop_at_first and total.failing:
            break
    seconds = time.monotonic() - started
    failing = sorted(total.failing, key=lambda outcome: outcome.seed)
    smallest = [minimised(outcome, plant) for outcome in failing[: 1 if stop_at_first else VIOLATIONS_MAX]]
    counted = coverage.grouped(total.coverage)
    return Summary(plant, total.seeds, seconds, total.steps, counted, failing, smallest)


def _parts(tasks: list[tuple[int, int, Plant]], processes: int) -> Iterator[Part]:
    if processes == 1 or len(tasks) == 1:
        yield from map(run_range, tasks)
        return
    # Fresh interpreters: the workers share nothing with whoever asked, not even its threads.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        yield from pool.imap_unordered(run_range, tasks)
