"""How fast pages move: Ballast's page stream against bare streams, everything in one run.

    python benchmarks/stream.py [--memory 1GiB] [--repeats 5] [--json]

Arm "ballast" is a real migration of a guest full of random data (skip none, integrity full, two node
processes and two guest agents): its first round, as the source measured it. The bare streams move as many
bytes in messages of the same size between two processes. Repeats are interleaved, ratios are of medians, and
nothing here is an assertion.

A virtual machine may give free memory back to its hypervisor and gets it slowly, page by page: the same store was
seen to cost 1.0 and 3.8 CPU-seconds per GiB. So memory is touched before every arm, as much as any of them needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import Series, machine_line, print_json, print_table, run_scenario_file

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
GIB = 1 << 30
TOUCHED_BYTES = 3 * GIB  # the RAM of a guest of 1 GiB on both hosts, and what the processes take

SCENARIO = """
name = "stream"
[guest]
memory = "{memory}"
[[guest.workload]]
name = "freed"
fraction = 0.91
keep = 0.91
[migration]
skip = "none"
integrity = "full"
downtime_limit = "300ms"
[run]
settle = "200ms"
run_on = "100ms"
"""


class Bare:
    """One bare receiver, kept for the whole benchmark."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.process = subprocess.Popen(
            [sys.executable, HERE / "bare.py", "receive", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = self._line()["port"]

    def _line(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line: dict[str, float] = json.loads(self.process.stdout.readline())
        return line

    def transfer(self, total: int) -> dict[str, float]:
        """One transfer by a fresh sender process."""
        transport = "tcp" if self.kind == "tcp" else "grpc"
        sender = subprocess.run(
            [sys.executable, HERE / "bare.py", "send", transport, str(self.port), "--bytes", str(total)],
            check=True,
            capture_output=True,
            text=True,
        )
        sent, received = json.loads(sender.stdout), self._line()
        assert sent["bytes"] == received["bytes"], (sent, received)
        return {
            "mb_per_s": total / sent["seconds"] / 1e6,
            "sender_cpu_s_per_gib": sent["cpu_seconds"] * GIB / total,
            "receiver_cpu_s_per_gib": received["cpu_seconds"] * GIB / total,
        }

    def stop(self) -> None:
        """End the receiver."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.kind == "tcp":
            self.process.terminate()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


def touch_memory() -> None:
    """Take this much memory and free it again, so that the next arm finds memory that is really there."""
    block = bytes(MIB)
    memfd = os.memfd_create("touched")
    for _ in range(TOUCHED_BYTES // MIB):
        os.write(memfd, block)
    os.close(memfd)


def ballast(scenario: Path, out: Path) -> dict[str, float]:
    """One migration; the figures of its first round."""
    run = run_scenario_file(scenario, out)
    first = run.result["rounds"][0]
    started = run.event("round_started", round=1)
    ended = run.event("round_ended", round=1)
    gib = first["payload_bytes"] / GIB
    source_cpu = ended["fields"]["cpu_seconds"] - started["fields"]["cpu_seconds"]
    dest_cpu = (
        run.event("pages_received")["fields"]["cpu_seconds"]
        - run.event("memory_reserved")["fields"]["cpu_seconds"]
    )
    return {
        "mb_per_s": first["payload_bytes"] / first["duration_ms"] / 1e3,
        "sender_cpu_s_per_gib": source_cpu / gib,
        "receiver_cpu_s_per_gib": dest_cpu / gib,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    series = {name: Series() for name in ("ballast", "store", "grpc", "tcp")}
    with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder:
        scenario = Path(folder) / "stream.toml"
        scenario.write_text(SCENARIO.format(memory=options.memory))
        bare = [Bare(kind) for kind in ("store", "grpc", "tcp")]
        try:
            for repeat in range(options.repeats):
                for peer in bare:
                    touch_memory()
                    series[peer.kind].add(peer.transfer(GIB))
                touch_memory()
                series["ballast"].add(ballast(scenario, Path(folder) / f"run-{repeat}"))
        finally:
            for peer in bare:
                peer.stop()
    rates = {name: median(one.values("mb_per_s")) for name, one in series.items()}
    ratios = {
        "ratio_to_bare_store": rates["ballast"] / rates["store"],
        "ratio_to_bare_grpc": rates["ballast"] / rates["grpc"],
        "ratio_to_tcp": rates["ballast"] / rates["tcp"],
    }
    if options.json:
        print_json({"machine": machine_line(), **ratios, "arms": {k: v.summary() for k, v in series.items()}})
        return
    print_table(f"page stream, medians of {options.repeats} (min-max)", series)
    for name, ratio in ratios.items():
        print(f"{name:22} {ratio:.3f}")


if __name__ == "__main__":
    main()
