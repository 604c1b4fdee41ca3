"""`ballast soak`: random scenarios, faults and crash cells, one after the other, until told to stop.

Rule 1: run number i of a seed is always the same run: its dice are its own, and `--only i` repeats it.
Rule 2: a run is drawn so that how it must end is known: a crash cell ends as the table says, anything else
        completes, or, where faults came, gives the guest back. What speaks about safety must speak for every run.
Rule 3: the directory of a run that failed is kept; of the others only their line, unless all are kept.
Rule 4: a run that the user broke off is no failure, unless it was unsafe.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from testbed.checkers.verdict import Verdict
from testbed.clock import now_ns
from testbed.crashes.cell import SAFETY, run_cell
from testbed.crashes.table import CELLS, Cell
from testbed.run.runner import FinishedRun, run_scenario
from testbed.scenario.file import validate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from testbed.interrupt import Interrupt
    from testbed.scenario.document import Scenario

CELL_SHARE: Final = 0.5
SKIPS: Final = ("none", "zero", "hint", "both")
POINTS: Final = ("round 1", "round 1 50%", "stop_copy", "saved", "prepared.recorded", "commit.sent", "200ms")
# Faults of hosts in containers, and how their parameters are drawn. None of them kills.
CONTAINER_FAULTS: Final[Mapping[str, Callable[[random.Random], dict[str, Any]]]] = {
    "partition": lambda _: {},
    "disconnect": lambda _: {},
    "reset": lambda _: {},
    "loss": lambda dice: {"share": f"{dice.randint(1, 20)}%"},
    "duplicate": lambda dice: {"share": f"{dice.randint(1, 20)}%"},
    "reorder": lambda dice: {"share": f"{dice.randint(1, 20)}%", "by": f"{dice.randint(1, 5)}ms"},
    "corrupt": lambda dice: {
        "share": f"{dice.randint(1, 5)}%",
        "checksum": dice.choice(("broken", "fixed")),
    },
    "delay": lambda dice: {"delay": f"{dice.randint(1, 50)}ms"},
    "rate": lambda dice: {"rate": f"{dice.choice((20, 100, 500))}Mbit/s"},
    "slow": lambda dice: {"cpus": dice.choice((0.3, 0.6))},
}
PROCESSES: Final = ("source_node", "dest_node", "guest_agent")
# Outcomes after which exactly one guest goes on, and nothing is lost.
WHOLE: Final = frozenset({"completed", "cancelled", "failed"})


@dataclass(frozen=True, slots=True)
class Drawn:
    """One run, as the dice said."""

    number: int
    seed: int
    title: str
    cell: Cell | None
    overrides: tuple[str, ...] = ()
    scenario: Scenario | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """What came of it."""

    drawn: Drawn
    outcome: str
    seconds: float
    problems: Sequence[str]
    run_dir: str  # "" when it was deleted

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.drawn.number, "what": self.drawn.title, "outcome": self.outcome,
            "seconds": round(self.seconds, 1), "problems": list(self.problems), "run_dir": self.run_dir,
        }  # fmt: skip


@dataclass(slots=True)
class Soaked:
    """A soak that ended."""

    seed: int
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)

    @property
    def failing(self) -> list[Line]:
        """Runs that something speaks against."""
        return [line for line in self.lines if line.problems]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "schema": 1, "seed": self.seed, "seconds": round(self.seconds, 1), "runs": len(self.lines),
            "failing": len(self.failing), "lines": [line.to_dict() for line in self.lines],
        }  # fmt: skip


def soak(
    drawn: Iterator[Drawn],
    out: Path,
    interrupt: Interrupt,
    tell: Callable[[Line], None],
    *,
    seed: int,
    minutes: float | None,
    keep: bool,
) -> Soaked:
    """Runs until the runs, the time or the user's patience end. Raises MachineCannotError, UsageError."""
    soaked, started_ns = Soaked(seed), now_ns()
    for one in drawn:
        soaked.seconds = (now_ns() - started_ns) / 1e9
        if interrupt.pressed or (minutes is not None and soaked.seconds >= 60 * minutes):
            break
        line = _run(one, out, interrupt, keep=keep)
        soaked.lines.append(line)
        tell(line)
    soaked.seconds = (now_ns() - started_ns) / 1e9
    return soaked


def _run(drawn: Drawn, out: Path, interrupt: Interrupt, *, keep: bool) -> Line:
    started_ns = now_ns()
    if drawn.cell is not None:
        done = run_cell(drawn.cell, out, interrupt, seed=drawn.seed, overrides=drawn.overrides)
        run, problems = done.run, list(done.problems)
    else:
        assert drawn.scenario is not None, "a run is a cell or a scenario"
        run = run_scenario(drawn.scenario, out, interrupt, lambda _: None)
        problems = problems_of(run, faults=bool(drawn.scenario.fault))
    if interrupt.pressed:
        problems = [problem for problem in _unsafe(run) if not problem.startswith("expectation")]
    path = run.run_dir.path
    if not problems and not keep:
        shutil.rmtree(path)
    seconds = (now_ns() - started_ns) / 1e9
    return Line(drawn, run.result.outcome, seconds, problems, str(path) if path.exists() else "")


def problems_of(run: FinishedRun, *, faults: bool) -> list[str]:
    """What speaks against a run of a random scenario."""
    if not faults:
        return list(run.judgement.reasons)
    # A run that completed has all the evidence there is, whatever came on its way.
    against = run.judgement.reasons if run.result.outcome == "completed" else _unsafe(run)
    problems = [problem for problem in against if not problem.startswith("expectation")]
    if run.result.outcome not in WHOLE:
        problems.append(f"the outcome is {run.result.outcome}, and no fault kills a guest")
    return problems


def _unsafe(run: FinishedRun) -> list[str]:
    return [
        f"{name}: {reason}"
        for name, finding in run.judgement.findings.items()
        if finding.verdict is Verdict.INVALID or (name in SAFETY and finding.verdict is not Verdict.VALID)
        for reason in finding.reasons
    ]


# -- drawing -----------------------------------------------------------------------------------------------


def draw(seed: int, hosts: str, *, first: int = 1) -> Iterator[Drawn]:
    """Run after run, without end (Rule 1)."""
    number = first
    while True:
        yield draw_one(seed, number, hosts)
        number += 1


def draw_one(seed: int, number: int, hosts: str) -> Drawn:
    """Run `number` of `seed`."""
    digest = hashlib.sha256(f"{seed}/soak/{number}".encode()).digest()
    dice = random.Random(int.from_bytes(digest[:8], "little"))
    run_seed = dice.randrange(1 << 31)
    if dice.random() < CELL_SHARE:
        return of_cell(dice.choice(CELLS), number, run_seed, hosts, dice)
    scenario, wrong = validate(_scenario(dice, hosts, run_seed))
    assert scenario is not None, wrong
    faults = ", ".join(f"{fault.kind} at {fault.at}" for fault in scenario.fault) or "no fault"
    migration = scenario.migration
    workloads = "+".join(workload.name for workload in scenario.guest.workload)
    title = (
        f"{workloads}, skip {migration.skip}, {migration.streams} streams, {migration.compression}, {faults}"
    )
    return Drawn(number, run_seed, title, None, scenario=scenario)


def of_cell(cell: Cell, number: int, seed: int, hosts: str, dice: random.Random | None = None) -> Drawn:
    """A crash cell; with dice the way there differs."""
    overrides = [f"hosts.kind={hosts}"]
    if dice is not None:
        # Hints only where a hint is to be open; the rest of the way is the same.
        skip = "both" if cell.point == "hint.open" else dice.choice(SKIPS)
        overrides += [f"migration.skip={skip}", f"migration.streams={dice.randint(1, 4)}"]
        overrides += [f"migration.compression={dice.choice(('none', 'lz4', 'zstd'))}"]
    return Drawn(number, seed, f"crash {cell.name}", cell, tuple(overrides))


def matrix(seed: int, hosts: str) -> Iterator[Drawn]:
    """Every cell of the table."""
    for number, cell in enumerate(CELLS, start=1):
        yield of_cell(cell, number, seed, hosts)


def _scenario(dice: random.Random, hosts: str, seed: int) -> dict[str, Any]:
    workloads: list[dict[str, Any]] = [
        {"name": "freed", "fraction": round(dice.uniform(0.2, 0.5), 2), "keep": round(dice.random() / 5, 2)},
        {"name": "kv", "records": dice.randint(200, 2000), "operations_per_second": dice.randint(50, 800)},
    ]
    if dice.random() < 0.6:
        rate, working_set = dice.randint(200, 3000), dice.choice((1, 2, 4, 8))
        workloads.append({"name": "writer", "rate": f"{rate}pages/s", "working_set": f"{working_set}MiB"})
    link_timeout = dice.choice((0, 0, 5000))
    faults = [_fault(dice, hosts) for _ in range(dice.choice((0, 0, 1, 1, 2)))]
    return {
        "name": "soak",
        "seed": seed,
        "guest": {"memory": dice.choice(("32MiB", "64MiB", "96MiB")), "workload": workloads},
        "migration": {
            "skip": dice.choice(SKIPS),
            "streams": dice.randint(1, 4),
            "compression": dice.choice(("none", "none", "lz4", "zstd")),
            "delta_cache": dice.choice((0, "8MiB")),
            "bandwidth": dice.choice((0, "32MiB/s", "64MiB/s", "128MiB/s")),
            "downtime_limit": dice.choice(("1ms", "50ms", "300ms")),
            "rounds_max": dice.randint(1, 6),
            "link_timeout": link_timeout,
        },
        "fault": faults,
        "run": {"settle": "50ms", "run_on": "50ms"},
        "hosts": {"kind": hosts},
        **({"link": {"offload": dice.random() < 0.5}} if hosts == "docker" else {}),
    }


def _fault(dice: random.Random, hosts: str) -> dict[str, Any]:
    fault: dict[str, Any] = {"at": dice.choice(POINTS), "for": f"{dice.randint(20, 800)}ms"}
    kind = dice.choice(("pause",) if hosts == "local" else ("pause", *CONTAINER_FAULTS))
    if kind == "pause":
        return {**fault, "kind": kind, "what": dice.choice(PROCESSES)}
    host = dice.choice(("source", "dest"))
    return {**fault, "kind": kind, "host": host, **CONTAINER_FAULTS[kind](dice)}
