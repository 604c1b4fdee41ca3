"""Migrations between two containers: at 1 Gbit/s with and without hints, and uncapped against bare streams.

    python benchmarks/containers.py [--repeats 3] [--memory 2] [--json]

Capped: a guest with 70 % of its memory freed and not zero and little of it live, on a link of 1 Gbit/s (a token
bucket on both hosts' interfaces, set from outside), arm none and arm hint. Uncapped: arm none beside a bare gRPC
stream with the run's own mutual TLS, receiver storing, and beside plain TCP, in the same two containers of the same
run, one after the other. Needs root and a Docker engine; the image is built first and is not part of any figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common import Series, machine_line, print_json, print_table

from host import CIPHER_SUITES_VARIABLE, NO_TLS12_SUITE
from testbed.faults.qdisc import Bucket, limit
from testbed.hosts.container import TLS
from testbed.hosts.engine import connect
from testbed.hosts.execution import Execution, run
from testbed.hosts.image import ensure
from testbed.interrupt import Interrupt
from testbed.record.run_record import RunRecord, load
from testbed.run.runner import conclude, record_run
from testbed.scenario.file import parse

if TYPE_CHECKING:
    from testbed.host_handles import Hosts
    from testbed.report.result import Result
    from testbed.run.session import Session

GUEST: Final = """
[guest]
memory = "{memory}"
[[guest.workload]]
name = "freed"
fraction = {fraction}
keep = 0.02
[[guest.workload]]
name = "idle"
[migration]
skip = "{arm}"
integrity = "stream"
[hosts]
kind = "docker"
[run]
settle = "300ms"
run_on = "100ms"
"""
FREED: Final = 0.72  # of which 0.02 are kept: 70 % of memory is freed and not zero
GBIT: Final = 125_000_000  # bytes per second
QUEUE_MS: Final = 50
BARE_BYTES: Final = 1 << 30
SOURCE: Final = Path(__file__).with_name("bare.py")
RECEIVERS: Final = {"bare_tcp": "tcp", "bare_grpc_mtls_store": "store"}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, default=2, metavar="GIB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    engine = connect()
    ensure(engine.client, lambda event, **_: print(event, file=sys.stderr))
    engine.close()
    arms = {name: Series() for name in ("capped none", "capped hint", "uncapped none")}
    with tempfile.TemporaryDirectory(prefix="ballast-bench-") as folder, Interrupt() as interrupt:
        for repeat in range(options.repeats):
            out = Path(folder) / str(repeat)
            for arm in ("none", "hint"):
                arms[f"capped {arm}"].add(capped(arm, options.memory, out, interrupt))
            arms["uncapped none"].add(uncapped(options.memory, out, interrupt))
    figures = conclusions(arms)
    if options.json:
        summaries = {name: series.summary() for name, series in arms.items()}
        print_json({"machine": machine_line(), "arms": summaries, "figures": figures})
    else:
        for name, series in arms.items():
            print_table(f"{options.memory} GiB guest between containers, {name}", {name: series})
        for name, (value, aim) in figures.items():
            print(f"{name:40} {value:.3g}   aimed at {aim}")
    return 0


def conclusions(arms: dict[str, Series]) -> dict[str, tuple[float, str]]:
    """What was aimed at: (measured, aim)."""
    none, hint, bare = (arms[name] for name in ("capped none", "capped hint", "uncapped none"))
    wire = statistics.median(hint.values("wire_mb")) / statistics.median(none.values("wire_mb"))
    starts = [*none.values("start_to_first_page_s"), *hint.values("start_to_first_page_s")]
    return {
        "hint_total_s": (statistics.median(hint.values("total_s")), "<= 1.2"),
        "hint_wire_share_of_none": (wire, "<= 0.12"),
        "none_to_bare_grpc_mtls_store": (statistics.median(bare.values("ratio_to_bare")), ">= 0.85"),
        "start_to_first_page_s": (statistics.median(starts), "<= 5"),
    }


def capped(arm: str, memory_gib: int, out: Path, interrupt: Interrupt) -> dict[str, float]:
    """One run at 1 Gbit/s."""

    def drive(session: Session, hosts: Hosts) -> None:
        for host in hosts.hosts.values():
            assert host.container is not None
            limit(host.network_pid or 0, host.container.address, Bucket(GBIT, QUEUE_MS))
        session.run()

    result, record = perform(arm, memory_gib, out, interrupt, drive)
    return {
        "total_s": (result.total_ms or 0) / 1000,
        "downtime_ms": result.downtime_ms or 0.0,
        "wire_mb": result.bytes.wire_tx / 1e6,
        "start_to_first_page_s": start_to_first_page(record),
    }


def uncapped(memory_gib: int, out: Path, interrupt: Interrupt) -> dict[str, float]:
    """One run without a limit: the bare streams first, while the guest idles, then the migration."""
    bare: dict[str, float] = {}

    def drive(session: Session, hosts: Hosts) -> None:
        bare.update(bare_streams(hosts))
        session.run()

    result, _ = perform("none", memory_gib, out, interrupt, drive)
    first = result.rounds[0]
    rate = first.payload_bytes / 1e6 / (first.duration_ms / 1000)
    return {
        "ballast_mb_s": rate,
        **{f"{name}_mb_s": value for name, value in bare.items()},
        "ratio_to_bare": rate / bare["bare_grpc_mtls_store"],
        "ratio_to_tcp": rate / bare["bare_tcp"],
    }


def perform(
    arm: str,
    memory_gib: int,
    out: Path,
    interrupt: Interrupt,
    drive: Callable[[Session, Hosts], None],
) -> tuple[Result, RunRecord]:
    """A run whose hosts `drive` may use before and while the session does; one that is not valid ends it all."""
    text = GUEST.format(memory=f"{memory_gib}GiB", fraction=FREED, arm=arm)
    scenario = parse(text, default_name=f"containers-{arm}")
    run_dir, broken = record_run(
        scenario, out, interrupt, lambda _: None, lambda session: drive(session, session.hosts)
    )
    finished = conclude(run_dir)
    if broken is not None or finished.exit_code:
        sys.exit(f"a run is not valid: {broken or finished.result.reasons}")
    return finished.result, load(run_dir.path)


def start_to_first_page(record: RunRecord) -> float:
    """Seconds from the moment when the first container was asked for to the first page on its way."""
    made = next(record.all("network_made")).at_ns
    return (next(record.all("round_started", "source")).at_ns - made) / 1e9


def bare_streams(hosts: Hosts) -> dict[str, float]:
    """MB/s of each bare stream between the two containers, from the source to the destination."""
    found, said_by = {}, []  # whose output nobody holds any more is taken for closed
    for name, kind in RECEIVERS.items():
        tls = ["--tls-dir", TLS, "--server-name", hosts.dest.server_name] if kind == "store" else []
        link = ["--address", address_of(hosts), *tls]
        # Standard input stays open for as long as the container lives: the receiver serves until it ends.
        waiting = ["sh", "-c", 'tail -f /dev/null | exec python3 -c "$0" "$@"']
        receiver = Execution(
            container(hosts.dest), [*encrypted(), *waiting, SOURCE.read_text(), "receive", kind, *link]
        )
        said_by.append(receiver.output())
        port = json.loads(next(said_by[-1]))["port"]
        transport = "tcp" if kind == "tcp" else "grpc"
        command = [
            *encrypted(), "python3", "-c", SOURCE.read_text(), "send", transport, str(port),
            "--bytes", str(BARE_BYTES), *link,
        ]  # fmt: skip
        status, said = run(container(hosts.source), command)
        if status:
            sys.exit(f"{name}: {said}")
        sent: dict[str, Any] = json.loads(said.splitlines()[-1])
        found[name] = sent["bytes"] / 1e6 / sent["seconds"]
    return found


def encrypted() -> list[str]:
    """The cipher suites of the nodes: the same TLS for both."""
    return ["env", f"{CIPHER_SUITES_VARIABLE}={NO_TLS12_SUITE}"]


def address_of(hosts: Hosts) -> str:
    """The destination's, on the run's network."""
    assert hosts.dest.container is not None
    return hosts.dest.container.address


def container(host: Any) -> Any:
    """The SDK's handle."""
    return host.container.handle


if __name__ == "__main__":
    sys.exit(main())
