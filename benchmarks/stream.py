"""How fast pages move: Ballast's page streams against bare streams, everything in one run.

    python benchmarks/stream.py [--memory 1GiB] [--repeats 5] [--json]

Arms "ballast 1", "2" and "4" are real migrations of a guest full of random data by so many streams (skip none,
integrity full, two node processes and two guest agents): their first round, as the source measured it. The bare
streams move as many bytes between two processes, in messages of 1 MiB, and once more in messages of the size that
Ballast uses, which gRPC moves with less work. Repeats are interleaved, ratios are of medians, and nothing here is
an assertion.

`cpu_ratio_...` is the same comparison by CPU-seconds of both processes together: on a machine that others use it is
the steadier one, and where all cores are busy it is the ratio of the rates.

What stores finds memory that is there, in every arm (common.Reserve): a hypervisor that took free memory back gives
it slowly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import Reserve, Series, WarmMemory, machine_line, print_json, print_table

from testbed.record.run_record import load as load_record
from testbed.scenario.document import Scenario
from testbed.units import parse_bytes

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
GIB = 1 << 30

STREAMS = (1, 2, 4)
# name -> what the receiver does with messages of which size; the second size is that of Ballast's chunks.
BARE = {
    "store": ("store", MIB),
    "grpc": ("grpc", MIB),
    "store_4mib": ("store", 4 * MIB),
    "grpc_4mib": ("grpc", 4 * MIB),
}


def scenario(memory_bytes: int, streams: int) -> Scenario:
    """A guest full of random data, sent whole."""
    return Scenario.model_validate({
        "name": f"stream-{streams}",
        "guest": {
            "memory": memory_bytes,
            "workload": [{"name": "freed", "fraction": 0.91, "keep": 0.91}],
        },
        "migration": {"skip": "none", "integrity": "full", "streams": streams, "downtime_limit": 300},
        "run": {"settle": 200, "run_on": 100},
    })  # fmt: skip


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

    def transfer(self, total: int, message_bytes: int) -> dict[str, float]:
        """One transfer by a fresh sender process."""
        transport = "tcp" if self.kind == "tcp" else "grpc"
        sender = subprocess.run(
            [
                *(sys.executable, HERE / "bare.py", "send", transport, str(self.port)),
                *("--bytes", str(total), "--message-bytes", str(message_bytes)),
            ],
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


def ballast(warm: WarmMemory, chosen: Scenario, out: Path) -> dict[str, float]:
    """One migration; the figures of its first round."""
    finished = warm.run(chosen, out)
    record = load_record(finished.run_dir.path)
    first = finished.result.rounds[0]
    gib = first.payload_bytes / GIB
    source = [
        event.fields["cpu_seconds"]
        for name in ("round_started", "round_ended")
        for event in record.all(name)
        if event.fields["round"] == 1
    ]
    dest = [next(record.all(name)).fields["cpu_seconds"] for name in ("memory_reserved", "pages_received")]
    return {
        "mb_per_s": first.payload_bytes / first.duration_ms / 1e3,
        "sender_cpu_s_per_gib": (source[1] - source[0]) / gib,
        "receiver_cpu_s_per_gib": (dest[1] - dest[0]) / gib,
    }


def ratios_of(series: dict[str, Series]) -> dict[str, float]:
    """Rates of one stream against the bare ones, the best of all streams, and the same by CPU-seconds."""
    rates = {name: median(one.values("mb_per_s")) for name, one in series.items()}
    cpu = {
        name: median(
            sender + receiver
            for sender, receiver in zip(
                one.values("sender_cpu_s_per_gib"), one.values("receiver_cpu_s_per_gib"), strict=True
            )
        )
        for name, one in series.items()
    }
    ours = [f"ballast {streams}" for streams in STREAMS]
    ratios = {f"ratio_to_bare_{bare}": rates["ballast 1"] / rates[bare] for bare in BARE}
    ratios["ratio_to_tcp"] = rates["ballast 1"] / rates["tcp"]
    ratios["ratio_of_best_streams_to_bare_grpc"] = max(rates[name] for name in ours) / rates["grpc"]
    ratios |= {f"cpu_ratio_to_bare_{bare}": cpu[bare] / cpu["ballast 1"] for bare in BARE}
    ratios["cpu_ratio_of_best_streams_to_bare_grpc"] = cpu["grpc"] / min(cpu[name] for name in ours)
    return ratios


def measure(repeats: int, memory_bytes: int, folder: Path) -> dict[str, Series]:
    """All arms, in turn."""
    series = {name: Series() for name in (*(f"ballast {streams}" for streams in STREAMS), *BARE, "tcp")}
    warm, stored = WarmMemory(memory_bytes), Reserve(GIB)
    peers = {kind: Bare(kind) for kind in ("store", "grpc", "tcp")}
    try:
        for repeat in range(repeats):
            for name, (kind, message_bytes) in {**BARE, "tcp": ("tcp", MIB)}.items():
                stored.fill()
                stored.release()
                series[name].add(peers[kind].transfer(GIB, message_bytes))
            for streams in STREAMS:
                figures = ballast(warm, scenario(memory_bytes, streams), folder / f"{repeat}-{streams}")
                series[f"ballast {streams}"].add(figures)
    finally:
        for peer in peers.values():
            peer.stop()
    return series


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=parse_bytes, default=GIB, metavar="SIZE")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder:
        series = measure(options.repeats, options.memory, Path(folder))
    ratios = ratios_of(series)
    if options.json:
        print_json({"machine": machine_line(), **ratios, "arms": {k: v.summary() for k, v in series.items()}})
        return
    print_table(f"page streams, medians of {options.repeats} (min-max)", series)
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:.3f}")


if __name__ == "__main__":
    main()
