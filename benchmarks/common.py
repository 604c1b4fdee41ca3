"""What the benchmarks share: series of figures, their table, and running a scenario as a user would."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from testbed.interrupt import Interrupt
from testbed.report.fitting_table import UNLIMITED_COLUMNS
from testbed.run.runner import conclude, record_run
from testbed.run.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.history import Event
    from testbed.run.runner import FinishedRun
    from testbed.scenario.document import Scenario


@dataclass(slots=True)
class Series:
    """Repeats of one arm: each repeat is a dict of figures."""

    repeats: list[dict[str, float]] = field(default_factory=list)

    def add(self, figures: dict[str, float]) -> None:
        """One more repeat."""
        self.repeats.append(figures)

    def values(self, name: str) -> list[float]:
        """One figure over all repeats."""
        return [repeat[name] for repeat in self.repeats]

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, minimum and maximum of every figure."""
        return {
            name: {"median": median(values), "min": min(values), "max": max(values)}
            for name in self.repeats[0]
            if (values := self.values(name))
        }


@dataclass(frozen=True, slots=True)
class Run:
    """A run's result document and its history."""

    result: dict[str, Any]
    events: list[dict[str, Any]]

    def event(self, name: str, **fields: object) -> dict[str, Any]:
        """The first event of this name with these fields."""
        for event in self.events:
            if event["name"] == name and all(event["fields"].get(k) == v for k, v in fields.items()):
                return event
        raise LookupError(f"no event {name} with {fields}")


def run_scenario_file(scenario: Path, out: Path, *options: str) -> Run:
    """`ballast run`, in a process of its own; a run that is not valid stops the benchmark."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ballast")),
            "run",
            str(scenario),
            "--out",
            str(out),
            "--json",
            *options,
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(
            f"{scenario.name} ended with {done.returncode}:\n{done.stderr[-2000:]}\n{done.stdout[-2000:]}"
        )
    result = json.loads(done.stdout)
    record = next(out.rglob("events.jsonl"))
    return Run(result, [json.loads(line) for line in record.read_text().splitlines()])


class Reserve:
    """Memory that is really there, kept for the moment that needs it.

    A virtual machine may report free memory to its hypervisor, which takes it, and gives it again slowly, page by
    page: the same store was seen to cost 1.0 and 3.8 CPU-seconds per GiB, the same 8 GiB 8 and 90 s. What is
    freed is reported after some two seconds: so it is held until just before it is used.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._fd = -1

    def fill(self) -> None:
        """Take it. A reserve that is there stays."""
        if self._fd >= 0:
            return
        block = bytes(1 << 20)
        self._fd = os.memfd_create("reserve")
        for _ in range(-(-self._size // len(block))):
            os.write(self._fd, block)

    def release(self) -> None:
        """Give it to whoever asks next. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WarmMemory:
    """Runs whose guest, and whose destination, find memory that is there: two reserves of the guest's size."""

    def __init__(self, memory_bytes: int) -> None:
        self._source, self._dest = Reserve(memory_bytes), Reserve(memory_bytes)

    def run(
        self, scenario: Scenario, out: Path, drive: Callable[[Session], None] = Session.run
    ) -> FinishedRun:
        """One run, `drive`n; one that is not valid stops the benchmark."""
        self._source.fill()
        self._dest.fill()
        self.release()  # a run looks for room before it starts anything

        def driven(session: Session) -> None:
            self._dest.fill()  # while the guest, which boots, takes the other half
            session.history.subscribe(self._heard)
            drive(session)

        with Interrupt() as interrupt:
            run_dir, broken = record_run(scenario, out, interrupt, lambda _: None, driven)
        finished = conclude(run_dir)
        if broken is not None or finished.exit_code:
            sys.exit(f"{scenario.name} is {finished.result.verdict}: {broken or finished.result.reasons}")
        return finished

    def _heard(self, event: Event) -> None:
        """At once, because a destination looks for room; two seconds later the rest begins to be taken away."""
        if event.name == "migration_requested":
            self._dest.release()

    def release(self) -> None:
        """Give everything back."""
        self._source.release()
        self._dest.release()


def machine_line() -> str:
    """Where these figures come from, in one line."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


def print_json(document: dict[str, Any]) -> None:
    """The document on stdout."""
    print(json.dumps(document, indent=2))


def print_table(title: str, arms: dict[str, Series]) -> None:
    """One row an arm, one column a figure: median (min-max). As wide as it must be: none is cut."""
    table = Table(title=title, caption=machine_line())
    table.add_column("arm")
    figures = list(next(iter(arms.values())).repeats[0])
    for name in figures:
        table.add_column(name, justify="right")
    for arm, series in arms.items():
        summary = series.summary()
        cells = [f"{s['median']:.4g} ({s['min']:.4g}-{s['max']:.4g})" for s in (summary[n] for n in figures)]
        table.add_row(arm, *cells)
    Console(width=UNLIMITED_COLUMNS).print(table)
