"""How fast a guest hints, how fast a harvest is, and what a node needs beside guest RAM.

    python benchmarks/hints.py [--memory 4GiB] [--large 8GiB] [--repeats 5] [--json]

Real migrations. Guest "hinting": half of memory written and freed again, then a writer that keeps 1 % of
memory dirty; the figures come from the source's own history (hints_opened .. the guest's STOP; the harvests
whose dirty set is near 1 %). The large guest migrates once, for the memory that both nodes take.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import Run, Series, machine_line, print_json, print_table, run_scenario_file

PAGE_BYTES = 4096
DIRTY_SHARE = 0.01

HINTING = """
name = "hinting"
[guest]
memory = "{memory}"
[[guest.workload]]
name = "freed"
fraction = 0.5
keep = 0.05
[[guest.workload]]
name = "writer"
rate = "400000pages/s"
working_set = "{working_set}"
pattern = "random"
[migration]
skip = "hint"
integrity = "stream"
downtime_limit = "1ms"
rounds_max = 6
[run]
settle = "200ms"
run_on = "100ms"
"""

LARGE = """
name = "large"
[guest]
memory = "{memory}"
[[guest.workload]]
name = "freed"
fraction = 0.7
keep = 0.1
[migration]
skip = "hint"
integrity = "full"
[run]
settle = "200ms"
run_on = "100ms"
"""


def hinting(run: Run) -> dict[str, float]:
    """Figures of one migration."""
    first = run.event("hints_stopped", round=1)["fields"]
    pages = run.result["guest"]["pages"]
    harvests = [
        event["fields"]
        for event in run.events
        if event["name"] == "harvested" and event["fields"]["dirty_pages"] > 0.7 * DIRTY_SHARE * pages
    ]
    hints = run.result["hints"]
    return {
        "request_to_stop_ms": first["duration_ms"],
        "hinted_share_of_free": first["pages"] / run.result["guest"]["free_pages_at_start"],
        "dropped_pages": hints["stale_pages"] + hints["rejected_ranges"],
        "late_pages": hints["late_pages"],
        "harvest_ms": min(h["duration_ms"] for h in harvests) if harvests else float("nan"),
        "harvest_ms_max": max(h["duration_ms"] for h in harvests) if harvests else float("nan"),
        "harvest_dirty_share": max(h["dirty_pages"] for h in harvests) / pages if harvests else 0.0,
    }


def large(run: Run) -> dict[str, float]:
    """Memory of the nodes, and that the guest arrived."""
    own = run.result["own_memory"]
    return {
        "guest_gib": run.result["guest"]["memory_bytes"] / 2**30,
        "source_own_mib": own["source_own_peak_bytes"] / 2**20,
        "dest_own_mib": own["dest_own_peak_bytes"] / 2**20,
        "total_ms": run.result["total_ms"],
        "valid": float(run.result["verdict"] == "valid"),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, default=4, metavar="GIB")
    parser.add_argument("--large", type=int, default=8, metavar="GIB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    working_set = int(options.memory * 2**30 * DIRTY_SHARE) // PAGE_BYTES * PAGE_BYTES
    series = {"hinting": Series()}
    with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder:
        base = Path(folder)
        scenario = base / "hinting.toml"
        scenario.write_text(HINTING.format(memory=f"{options.memory}GiB", working_set=working_set))
        for repeat in range(options.repeats):
            series["hinting"].add(hinting(run_scenario_file(scenario, base / f"hinting-{repeat}")))
        scenario = base / "large.toml"
        scenario.write_text(LARGE.format(memory=f"{options.large}GiB"))
        big = {"large": Series()}
        big["large"].add(large(run_scenario_file(scenario, base / "large")))
    if options.json:
        arms = {name: one.summary() for name, one in (series | big).items()}
        print_json({"machine": machine_line(), "arms": arms})
        return
    print_table(f"hints of a {options.memory} GiB guest, medians of {options.repeats} (min-max)", series)
    print_table("what the nodes need beside guest RAM", big)


if __name__ == "__main__":
    main()
