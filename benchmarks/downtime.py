"""Where the downtime of an idle guest goes, part by part, at the default downtime limit.

    python benchmarks/downtime.py [--repeat 5] [--memory 64MiB,1GiB] [--json]

Arms are memory sizes x integrity, in turn. The guest has been up for a while: nine tenths of its memory were
written since it booted, a tenth is kept, the rest is free again; then it does nothing but beat its clock. Downtime
is pause ordered until COMMITTED answered, without the time in which integrity "full" hashes RAM (verify_ms, told
apart); `guest_blackout_ms` is what the guest saw, that hashing included. The parts of a run sum to its downtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common import Series, run_scenario_file
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

SCENARIO: Final = """
[guest]
memory = "{memory}"
[[guest.workload]]
name = "freed"
fraction = 0.9
keep = 0.1
[[guest.workload]]
name = "idle"
[migration]
skip = "both"
integrity = "{integrity}"
[run]
settle = "1s"
run_on = "200ms"
"""
INTEGRITY: Final = ("full", "stream")
LIMIT_MS: Final = 30.0


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """Downtime, its parts, and what the guest saw, in ms."""
    parts = {f"part_{name}_ms": value for name, value in result["downtime_parts_ms"].items()}
    counted = sum(value for name, value in result["downtime_parts_ms"].items() if name != "verify")
    return {
        "downtime_ms": result["downtime_ms"],
        "unaccounted_ms": result["downtime_ms"] - counted,
        "guest_blackout_ms": result["guest_blackout_ms"],
        "verify_ms": result["verify_ms"],
        **parts,
    }


def measure(sizes: Sequence[str], repeat: int) -> dict[str, Series]:
    """Every arm `repeat` times, in turn."""
    arms = {f"{memory} {integrity}": Series() for memory, integrity in product(sizes, INTEGRITY)}
    with tempfile.TemporaryDirectory(prefix="ballast-downtime-") as directory:
        scenario, out = Path(directory, "idle.toml"), 0
        for _ in range(repeat):
            for name, series in arms.items():
                memory, integrity = name.split()
                scenario.write_text(SCENARIO.format(memory=memory, integrity=integrity), encoding="utf-8")
                out += 1
                run = run_scenario_file(scenario, Path(directory, str(out)))
                series.add(figures_of(run.result))
    return arms


def main(argv: list[str] | None = None) -> int:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--memory", default="64MiB,1GiB", help="sizes, separated by commas")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    arms = {
        name: series.summary() for name, series in measure(options.memory.split(","), options.repeat).items()
    }
    if options.json:
        print(json.dumps({"limit_ms": LIMIT_MS, "repeat": options.repeat, "arms": arms}, indent=2))
        return 0
    table = Table("arm", *next(iter(arms.values())))
    for name, summary in arms.items():
        table.add_row(
            name, *(f"{one['median']:.1f} ({one['min']:.1f}-{one['max']:.1f})" for one in summary.values())
        )
    Console(width=None if sys.stdout.isatty() else 220).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
