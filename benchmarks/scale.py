"""Whether cost grows with memory, and no faster: migrations of 1 to 8 GiB, and bitmap work for memories nobody has.

    python benchmarks/scale.py [--memory 1GiB,2GiB,4GiB,8GiB] [--repeat 5] [--bitmaps-only] [--json]

`migration`: a guest that wrote all of its memory and freed 7/8 of it, skip none and both, unlimited bandwidth.
Cost is CPU-seconds of both nodes (what a machine spends; wall time beside it). What a migration costs at any size
is fitted as a constant and told apart: `flat` compares the rest, (cost - constant) / GiB, of the sizes: its largest
deviation from the mean, as a share of the mean.

`bitmaps`: no guest, no kernel: what the source does with a round's bits. `harvest` makes the set of what the
kernel's scan answered (runs), `round` opens the round on it, `hints` applies the guest's report (7/8 of memory in
blocks of 4 MiB, as many to a batch as the device hands over), `end` counts what was skipped and is dirty again.
`take` hands the rest out in batches: it grows with what is sent, not with memory, and stands apart. Round 1 is all
of memory, a later round holds DIRTY_PAGES scattered pages. `per_round_ms` is the sum without `take`, of the dearer
of the two rounds; `per_round_cpu_ms` is the same on the CPU's clock, which others on the machine do not stretch.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from common import Series, WarmMemory, machine_line, print_json, print_table

from migration.page_bits import PageBits
from migration.round_set import RoundSet
from testbed.scenario.document import Scenario
from testbed.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.pages import U64Array

PAGE_BYTES = 4096
TIB = 1 << 40
BITMAP_SIZES = (8 << 30, 128 << 30, TIB, 16 * TIB)
BLOCK_PAGES = 1024
BATCH_BLOCKS = 128
TAKE_PAGES = 2048
DIRTY_PAGES = 100_000
SETS_AT_ONCE = 6  # of one bit a page: candidates, hinted, skipped, dirty, and what is being made
RANDOM_SEED = 1


def scenario(memory: int, skip: str) -> Scenario:
    """A guest that wrote 0.9 of its memory and keeps an eighth."""
    return Scenario.model_validate({
        "name": "scale",
        "guest": {"memory": memory, "workload": [{"name": "freed", "fraction": 0.9, "keep": 0.125}]},
        "migration": {"skip": skip, "integrity": "stream", "timeout": 0},
        "run": {"settle": 200, "run_on": 50},
    })  # fmt: skip


def migration(memory: int, skip: str) -> dict[str, float]:
    """One migration: what it cost per GiB of the guest."""
    warm = WarmMemory(memory)
    with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder:
        result = warm.run(scenario(memory, skip), Path(folder)).result
    gib = memory / 2**30
    cpu = result.cpu_seconds.source + result.cpu_seconds.dest
    return {
        "gib": gib,
        "total_ms": result.total_ms,
        "cpu_seconds": cpu,
        "total_ms_per_gib": result.total_ms / gib,
        "cpu_seconds_per_gib": cpu / gib,
    }


def flat(sizes: dict[int, Series], figure: str) -> dict[str, float]:
    """How flat a cost per GiB is once the constant is told apart (least squares over the medians)."""
    gib = np.array([size / 2**30 for size in sizes])
    costs = np.array([median(series.values(figure)) for series in sizes.values()])
    if gib.size < 2:
        return {"constant": 0.0, "per_gib": float(costs[0] / gib[0]), "deviation": 0.0}
    # Weighted by 1 / GiB: a share of the cost, not the cost, is to fit at every size.
    _, constant = np.polyfit(gib, costs, 1, w=1 / gib)
    constant = max(float(constant), 0.0)
    rest = (costs - constant) / gib
    return {
        "constant": constant,
        "per_gib": float(rest.mean()),
        "deviation": float(np.abs(rest / rest.mean() - 1).max()),
    }


def report_blocks(pages: int) -> list[tuple[U64Array, U64Array]]:
    """The guest's report: seven of eight blocks, in batches."""
    blocks = np.arange(pages // BLOCK_PAGES, dtype=np.uint64)
    first = blocks[blocks % 8 != 0] * np.uint64(BLOCK_PAGES)
    return [
        (part, np.full(part.size, BLOCK_PAGES, np.uint64))
        for part in np.split(first, range(BATCH_BLOCKS, first.size, BATCH_BLOCKS))
    ]


def timed(parts: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; how long it took, on the clock and on the CPU, are two of the parts."""
    started, cpu = time.perf_counter(), time.process_time()
    given = work()
    parts[f"{name}_cpu"] = (time.process_time() - cpu) * 1e3
    parts[name] = (time.perf_counter() - started) * 1e3
    return given


def one_round(pages: int, runs: tuple[U64Array, U64Array], dirty: PageBits, index: int) -> dict[str, float]:
    """A round on these runs, from the scan's answer to its books."""
    parts: dict[str, float] = {}
    batches = report_blocks(pages)
    candidates = timed(parts, "harvest", lambda: PageBits.of_runs(*runs, pages))
    round_set = timed(parts, "round", lambda: RoundSet(index, candidates, hints_allowed=True))

    def hints() -> int:
        for first, count in batches:
            round_set.hint(first, count)
        return int(round_set.remaining)

    timed(parts, "hints", hints)

    def take() -> None:
        while (taken := round_set.take(TAKE_PAGES)).size:
            round_set.record_sent(taken.size, 0, 0)

    timed(parts, "take", take)
    timed(parts, "end", lambda: round_set.finish(dirty))
    counted = ("harvest", "round", "hints", "end")
    return {
        **parts,
        "per_round_ms": sum(parts[name] for name in counted),
        "per_round_cpu_ms": sum(parts[f"{name}_cpu"] for name in counted),
    }


def bitmaps(memory: int) -> dict[str, dict[str, float]]:
    """Both kinds of round at one size."""
    pages = memory // PAGE_BYTES
    scattered = np.unique(np.random.default_rng(RANDOM_SEED).integers(0, pages, DIRTY_PAGES, dtype=np.uint64))
    later = scattered, np.ones(scattered.size, np.uint64)
    everything = np.zeros(1, np.uint64), np.array([pages], np.uint64)
    dirty = PageBits.of_runs(*later, pages)
    return {
        "round 1": one_round(pages, everything, dirty, 1),
        "later round": one_round(pages, later, dirty, 2),
    }


def measured_bitmaps(repeat: int) -> dict[int, dict[str, Series]]:
    """A round of each kind at every size."""
    found: dict[int, dict[str, Series]] = {}
    for memory in BITMAP_SIZES:
        # A hypervisor that took free memory back gives it again at the first touch, slowly: that is not measured.
        np.ones(SETS_AT_ONCE * (memory // PAGE_BYTES // 8), np.uint8)
        series = {"round 1": Series(), "later round": Series()}
        for _ in range(repeat):
            for name, figures in bitmaps(memory).items():
                series[name].add(figures)
        found[memory] = series
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="1GiB,2GiB,4GiB,8GiB", metavar="SIZES")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--bitmaps-only", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bits = measured_bitmaps(options.repeat)
    arms: dict[str, dict[int, Series]] = {}
    if not options.bitmaps_only:
        sizes = [parse_bytes(size) for size in options.memory.split(",")]
        arms = {skip: {size: Series() for size in sizes} for skip in ("none", "both")}
        for repeat in range(options.repeat):
            for size in sizes:
                for skip, series in arms.items():
                    series[size].add(migration(size, skip))
                    print(f"{repeat + 1}/{options.repeat} {format_bytes(size)} {skip}", file=sys.stderr)
    report: dict[str, Any] = {
        "machine": machine_line(),
        "repeats": options.repeat,
        "migration": {
            skip: {
                "flat_cpu": flat(series, "cpu_seconds"),
                "flat_time": flat(series, "total_ms"),
                "sizes": {str(size): one.summary() for size, one in series.items()},
            }
            for skip, series in arms.items()
        },
        "bitmaps": {
            str(memory): {
                **{
                    figure: max(median(one.values(figure)) for one in series.values())
                    for figure in ("per_round_ms", "per_round_cpu_ms")
                },
                **{name: one.summary() for name, one in series.items()},
            }
            for memory, series in bits.items()
        },
    }
    at_1_tib, at_16_tib = (report["bitmaps"][str(size)] for size in (TIB, 16 * TIB))
    for figure in ("per_round_ms", "per_round_cpu_ms"):
        report["bitmaps"][f"{figure}_at_1_tib"] = at_1_tib[figure]
    # Round 1 grows with memory; 16 TiB against 1 TiB, per GiB, minus 1.
    per_round = [part["round 1"]["per_round_cpu_ms"]["median"] for part in (at_1_tib, at_16_tib)]
    report["bitmaps"]["growth_1_to_16_tib"] = per_round[1] / per_round[0] / 16 - 1
    if arms:
        report["flat"] = max(part["flat_cpu"]["deviation"] for part in report["migration"].values())
    if options.json:
        print_json(report)
        return
    for memory, both in bits.items():
        print_table(f"bitmaps of {format_bytes(memory)}, ms", both)
    for skip, series in arms.items():
        rows = {format_bytes(size): one for size, one in series.items()}
        print_table(f"skip {skip}: {report['migration'][skip]['flat_cpu']}", rows)


if __name__ == "__main__":
    main()
