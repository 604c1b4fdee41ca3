"""The series' own table: how much sooner a guest is elsewhere when its free pages are hinted.

    python benchmarks/headline.py [--memory 8GiB] [--repeat 5] [--only idle,idle_untouched,build] [--json]

Real migrations, unlimited bandwidth, downtime limit 400 ms. "Legacy" is zero-page detection without hints
(skip = zero), the other is both. Arms take turns, so that a noisy moment hits all of them.

idle            all memory a workload may have was written once, 7/8 of memory is free again and still resident
idle_untouched  7/8 of memory was never touched: what zero detection is good at
build           as idle, and four compilers at work (workload "build", its parameters in BUILD below)

`reduction` is 1 - both / legacy of the medians of total_ms. `guest_cost` is what migrating costs the guest beside
the stop: CPU-seconds of the guest's process per page of its work, from the request to the pause, against a stretch
in the same run before it, minus 1. All four arms run on the idle guest: freed memory that is not zero.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from common import Series, WarmMemory, machine_line, print_json, print_table

from testbed.scenario.document import Scenario
from testbed.units import parse_bytes

if TYPE_CHECKING:
    from testbed.history import Event
    from testbed.report.result import Result
    from testbed.run.session import Session

LEGACY, HINTED = "zero", "both"
WRITTEN = 0.92  # of memory: the most that a scenario gives to its workloads
USED = 0.125
DOWNTIME_LIMIT_MS = 400
BUILD = {
    "name": "build", "jobs": 4, "passes": 2, "reads": 24, "rate": 10_000,
    # Shares of 8 GiB, so that a smaller guest has a smaller build: 128, 128, 1 and 64 x 1 MiB there.
    "arena": 1 / 64, "headers": 1 / 64, "object": 1 / 8192, "objects": 64,
}  # fmt: skip
SAMPLE_S = 0.05
BEFORE_S = 3.0

Sample = tuple[float, int]  # CPU-seconds of the guest's process so far, pages of work so far


def scenario(case: str, skip: str, memory: int, seed: int) -> Scenario:
    """One run of a case in an arm."""
    written = USED if case == "idle_untouched" else WRITTEN
    workloads: list[dict[str, Any]] = [{"name": "freed", "fraction": written, "keep": USED}]
    if case == "build":
        # The build needs room beside what is filled first: the same memory, used in turn.
        sizes = {key: int(BUILD[key] * memory) // 4096 * 4096 for key in ("arena", "headers", "object")}
        build = {**BUILD, **sizes}
        kept = build["jobs"] * build["arena"] + build["headers"] + (build["objects"] + 1) * build["object"]
        workloads = [{"name": "freed", "fraction": WRITTEN - kept / memory, "keep": USED}, build]
    return Scenario.model_validate({
        "name": f"{case}-{skip}",
        "seed": seed,
        "guest": {"memory": memory, "workload": workloads},
        "migration": {
            "skip": skip, "integrity": "stream", "downtime_limit": DOWNTIME_LIMIT_MS, "timeout": 0,
        },
        "run": {"settle": 300, "run_on": 100},
    })  # fmt: skip


class Meter:
    """Looks at the guest's CPU time and work, at the same pace before and during the migration."""

    def __init__(self) -> None:
        self.before: list[Sample] = []
        self.during: list[Sample] = []
        self._paused = threading.Event()

    def drive(self, session: Session) -> None:
        """For record_run: a stretch without a migration, then the run."""
        session.settle()
        source = session.hosts.source.client
        waiting = threading.Event()

        def look(samples: list[Sample]) -> None:
            status = source.guest_status()
            samples.append((status.cpu_seconds, status.operations))

        for _ in range(round(BEFORE_S / SAMPLE_S)):
            look(self.before)
            waiting.wait(SAMPLE_S)
        requested = threading.Event()
        session.history.subscribe(lambda event: self._heard(event, requested))

        def follow() -> None:
            requested.wait()
            while not self._paused.is_set():
                look(self.during)
                self._paused.wait(SAMPLE_S)

        follower = threading.Thread(target=follow)
        follower.start()
        try:
            session.run()
        finally:
            requested.set()
            self._paused.set()
            follower.join()

    def _heard(self, event: Event, requested: threading.Event) -> None:
        if event.name == "migration_started":
            requested.set()
        elif event.name in {"guest_paused", "migration_ended"}:
            self._paused.set()

    @property
    def worked(self) -> bool:
        """Whether the guest did anything that could become dearer."""
        return _per_operation(self.before) > 0 and _per_operation(self.during) > 0

    def cost(self) -> float:
        """CPU per page of work during the migration against before, minus 1."""
        return _per_operation(self.during) / _per_operation(self.before) - 1


def _per_operation(samples: list[Sample]) -> float:
    """The last look may have found the guest paused already: work and CPU stand still there alike."""
    operations = samples[-1][1] - samples[0][1] if samples else 0
    return (samples[-1][0] - samples[0][0]) / operations if operations else 0.0


def run(warm: WarmMemory, chosen: Scenario, out: Path) -> tuple[Result, Meter]:
    """One migration; a run that is not valid stops the benchmark."""
    meter = Meter()
    return warm.run(chosen, out, meter.drive).result, meter


def figures(result: Result, meter: Meter) -> dict[str, float]:
    """Of one run."""
    return {
        "total_ms": result.total_ms,
        "downtime_ms": result.downtime_ms,
        "rounds": float(len(result.rounds)),
        "wire_mib": result.bytes.wire_tx / 2**20,
        "skipped_share": result.hints.skipped_pages / result.guest.pages,
        "cpu_seconds": result.cpu_seconds.source + result.cpu_seconds.dest,
        **({"guest_cost": meter.cost()} if meter.worked else {}),
    }


def reduction(arms: dict[str, Series]) -> dict[str, Any]:
    """Of the medians, and of each repeat's pair for the spread."""
    legacy, hinted = arms[LEGACY].values("total_ms"), arms[HINTED].values("total_ms")
    pairs = [1 - ours / theirs for ours, theirs in zip(hinted, legacy, strict=True)]
    return {
        "reduction": 1 - median(hinted) / median(legacy),
        "reduction_min": min(pairs),
        "reduction_max": max(pairs),
        "arms": {skip: series.summary() for skip, series in arms.items()},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=parse_bytes, default=8 << 30, metavar="SIZE")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="idle,idle_untouched,build", metavar="CASES")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cases = {
        case: ("none", LEGACY, "hint", HINTED) if case == "idle" else (LEGACY, HINTED)
        for case in options.only.split(",")
    }
    series = {case: {skip: Series() for skip in arms} for case, arms in cases.items()}
    warm = WarmMemory(options.memory)
    for repeat in range(options.repeat):
        for case, arms in cases.items():
            for skip in arms:
                with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder:
                    found = run(warm, scenario(case, skip, options.memory, repeat + 1), Path(folder))
                series[case][skip].add(figures(*found))
                print(
                    f"{repeat + 1}/{options.repeat} {case} {skip}: {found[0].total_ms:.0f} ms",
                    file=sys.stderr,
                )
    report: dict[str, Any] = {
        "machine": machine_line(),
        "memory_bytes": options.memory,
        "repeats": options.repeat,
        "bandwidth": "unlimited",
        "downtime_limit_ms": DOWNTIME_LIMIT_MS,
        **{case: reduction(arms) for case, arms in series.items()},
    }
    if "build" in series:
        report["build"] |= {
            "guest_cost": median(series["build"][HINTED].values("guest_cost")),
            "guest_cost_legacy": median(series["build"][LEGACY].values("guest_cost")),
            "workload": BUILD,
        }
    if options.json:
        print_json(report)
        return
    for case, arms in series.items():
        print_table(f"{case}: reduction {report[case]['reduction']:.3f}", arms)


if __name__ == "__main__":
    main()
