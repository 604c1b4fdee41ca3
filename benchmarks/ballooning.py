"""What ballooning costs: page frame arrays against scatter-gather entries, and against punching alone.

    python benchmarks/ballooning.py [--memory 8GiB] [--repeats 3] [--no-resident] [--json]

A real agent process and the host's real balloon device inflate 7/8 of a guest. "idle": the guest never touched
most of its memory, as after a boot. "resident": the host has a page for each of its free ones; "punch" is what
punching the very same runs then costs when nobody talks to anybody, in the same guest, made resident again. The
split: "allocate" and "send" are the guest's, "translate" (chains to runs) and "release" (punching) the device's;
they overlap, so their sum is not the whole. Then hinting and reporting as throughput, and the sparse bitmap beside
other sets (`sparse_sets.py`).

Memory is made resident by writing the shared file, so the guest's page table does not map it: punching mapped pages
costs more, and what is added to it would look smaller.

"arrays" has up to 16 arrays of 256 pages in flight, and its device punches neighbours together: a faster legacy
than the stock driver and QEMU, whose figures are in the series.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import sparse_sets
from bench_guest import PAGE_BYTES, BenchGuest, DeviceSpend, running_guest, wait_for
from common import Series, machine_line, print_json, print_table

from host.guest_memory import punch_hole
from testbed.units import parse_bytes

IDLE: list[dict[str, Any]] = [{"name": "idle"}]
SHARE = (7, 8)


def inflate(
    memory: int, spend: DeviceSpend, *, sg: bool, resident: bool, punch: bool = False
) -> dict[str, float]:
    """Figures of one inflation and of the deflation after it; `punch`: and of punching the same runs alone."""
    pages = memory // PAGE_BYTES * SHARE[0] // SHARE[1]
    with running_guest(memory, IDLE, sg=sg, stats=False) as guest:
        if resident:
            guest.make_resident()
        spend.reset()
        before, cpu = guest.link.hello(), time.process_time()
        total_ms = guest.balloon(pages)
        after = guest.link.hello()
        runs = list(spend.runs)
        if sum(count for _, count in runs) != pages:
            raise SystemExit(f"{sum(count for _, count in runs)} pages punched, {pages} ballooned")
        figures = {
            "total_ms": total_ms,
            "allocate_ms": after.balloon["allocate_ms"] - before.balloon["allocate_ms"],
            "send_ms": after.balloon["send_ms"] - before.balloon["send_ms"],
            "translate_ms": spend.seconds["translate"] * 1000,
            "release_ms": spend.seconds["release"] * 1000,
            "guest_cpu_ms": (after.cpu_seconds - before.cpu_seconds) * 1000,
            "device_cpu_ms": (time.process_time() - cpu) * 1000,
            "runs": len(runs),
            "deflate_ms": guest.balloon(0),
        }
        if punch:
            if resident:
                guest.make_resident()
            figures |= punch_alone(guest, runs)
    return figures


def punch_alone(guest: BenchGuest, runs: list[tuple[int, int]]) -> dict[str, float]:
    """Punching runs in the memory of a guest that is up and not told of it."""
    ram = guest.link.ram()
    try:
        started, cpu = time.perf_counter(), time.thread_time()
        for first, count in runs:
            punch_hole(ram.memfd, first * PAGE_BYTES, count * PAGE_BYTES)
        cpu = time.thread_time() - cpu
        return {"punch_ms": (time.perf_counter() - started) * 1000, "punch_cpu_ms": cpu * 1000}
    finally:
        ram.close()


def hinting(memory: int, driver: str) -> dict[str, float]:
    """One report of an idle guest."""
    with running_guest(memory, IDLE, hints=driver, stats=False) as guest:
        took_ms, pages = guest.hint()
    return {
        "total_ms": took_ms,
        "gib": pages * PAGE_BYTES / 2**30,
        "gib_per_s": pages * PAGE_BYTES / 2**30 / took_ms * 1000,
    }


def reporting(memory: int, spend: DeviceSpend) -> dict[str, float]:
    """Free page reporting of an idle guest, from the first pass of the device to the last of the first sweep."""
    spend.reset()
    with running_guest(memory, IDLE, reporting=True, stats=False) as guest:
        most = 0.9 * guest.link.hello().free_pages
        wait_for(
            lambda: sum(pages for _, pages in list(spend.reports)) > most, "nearly all memory to be reported"
        )
    took_s = spend.reports[-1][0] - spend.reports[0][0]
    gib = sum(pages for _, pages in spend.reports[1:]) * PAGE_BYTES / 2**30
    return {"total_ms": took_s * 1000, "gib": gib, "gib_per_s": gib / took_s}


def variant(
    memory: int, repeats: int, spend: DeviceSpend, *, resident: bool
) -> tuple[dict[str, Series], dict[str, float]]:
    """Both arms over one kind of guest, and the comparison of their medians."""
    arms = {"arrays": Series(), "sg": Series()}
    for _ in range(repeats):
        arms["arrays"].add(inflate(memory, spend, sg=False, resident=resident))
        arms["sg"].add(inflate(memory, spend, sg=True, resident=resident, punch=True))
    legacy_ms, sg_ms = (median(arms[arm].values("total_ms")) for arm in ("arrays", "sg"))
    compared = {"legacy_ms": legacy_ms, "sg_ms": sg_ms, "reduction": 1 - sg_ms / legacy_ms}
    if resident:
        sg = arms["sg"].summary()
        compared["punch_ms"] = sg["punch_ms"]["median"]
        compared["sg_over_punch"] = sg_ms / compared["punch_ms"]
        # What other work on the machine leaves alone: the best of each, and the processor time of the device.
        compared["sg_over_punch_best"] = sg["total_ms"]["min"] / sg["punch_ms"]["min"]
        compared["sg_over_punch_cpu"] = sg["device_cpu_ms"]["median"] / sg["punch_cpu_ms"]["median"]
    return arms, compared


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=parse_bytes, default=8 << 30, metavar="SIZE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--no-resident", action="store_true", help="leave the guests out that fill the host's memory"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spend = DeviceSpend()
    spend.watch()
    arms, compared = {}, {}
    for kind in ["idle"] if options.no_resident else ["idle", "resident"]:
        resident = kind == "resident"
        arms[kind], compared[kind] = variant(options.memory, options.repeats, spend, resident=resident)
    free_pages = {"hinting, hold": Series(), "hinting, walk": Series(), "reporting": Series()}
    for _ in range(options.repeats):
        free_pages["hinting, hold"].add(hinting(options.memory, "hold"))
        free_pages["hinting, walk"].add(hinting(options.memory, "walk"))
        free_pages["reporting"].add(reporting(options.memory, spend))
    sets = sparse_sets.compare()
    if options.json:
        print_json(
            {
                "machine": machine_line(),
                "memory_bytes": options.memory,
                "repeats": options.repeats,
                **{key: compared["idle"][key] for key in ("legacy_ms", "sg_ms", "reduction")},
                "compared": compared,
                "arms": {k: {name: s.summary() for name, s in a.items()} for k, a in arms.items()},
                "free_pages": {name: series.summary() for name, series in free_pages.items()},
                "sets": sets,
            }
        )
        return
    for kind, series in arms.items():
        print_table(f"inflating 7/8 of {options.memory >> 20} MiB, {kind}: median (min-max)", series)
        print(", ".join(f"{name} {value:.3g}" for name, value in compared[kind].items()))
    print_table("free pages told to the host", free_pages)
    print_table("sparse sets of page numbers", {name: Series([row]) for name, row in sets.items()})


if __name__ == "__main__":
    main()
