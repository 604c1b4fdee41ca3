"""What this machine lacks for faults, found out by doing them in a network namespace that ends with the probe.

Rule 1: the probe is a process of its own in a namespace of its own; it leaves nothing behind.
Rule 2: it is asked once: a kernel does not change while we run.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from collections.abc import Callable

Capability: TypeAlias = Literal["rules", "rate", "queues", "offload"]
PROBE_S: Final = 30.0  # each probe takes milliseconds
LOOPBACK: Final = "127.0.0.1"
TABLE: Final = "ballast_probe"


def lacks(capability: Capability) -> str:
    """Why it cannot be had, in one line; "" when it can."""
    return found_out()[capability]


@functools.cache
def found_out() -> dict[Capability, str]:
    """Of every capability why not, "" for those that work."""
    if reason := _no_namespace():
        return dict.fromkeys(PROBES, reason)
    command = ["unshare", "--net", sys.executable, "-m", "testbed.faults.probing"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return dict.fromkeys(PROBES, f"the probe did not end: {error}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return dict.fromkeys(PROBES, f"a network namespace of its own: {lines[-1]}; be root")
    answers: dict[Capability, str] = json.loads(done.stdout)
    return answers


def _no_namespace() -> str:
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid():
        return "the hosts' network namespaces are entered from outside: be root"
    missing = [tool for tool in ("nft", "unshare") if shutil.which(tool) is None]
    packages = {"nft": "nftables", "unshare": "util-linux"}
    if missing:
        named = " ".join(packages[tool] for tool in missing)
        return f"{' and '.join(missing)} not found: apt-get install {named}"
    return ""


def _rules() -> None:
    from testbed.faults import nft  # noqa: PLC0415 - only the probing process needs it

    body = f" chain taken {{\n  counter drop\n }}\n{nft.incoming([nft.choose([1, 2, 5], 'taken')])}"
    nft.load(os.getpid(), nft.table(TABLE, body + "\n chain more {\n  reject with tcp reset\n }"))
    nft.delete_table(os.getpid(), TABLE)


def _rate() -> None:
    from testbed.faults import qdisc  # noqa: PLC0415

    qdisc.limit(os.getpid(), LOOPBACK, qdisc.Bucket(rate=1_000_000, queue_ms=50))


def _queues() -> None:
    from testbed.faults import nft  # noqa: PLC0415
    from testbed.faults.nfqueue import PacketQueue  # noqa: PLC0415

    nft.load(os.getpid(), nft.table(TABLE, " chain taken {\n }"))
    nft.queue_chain(os.getpid(), TABLE, "taken", 1)
    PacketQueue(1, payloads=False).close()


def _offload() -> None:
    from testbed.faults import offload  # noqa: PLC0415

    offload.read(os.getpid(), LOOPBACK)


NEEDED_FOR: Final[dict[Capability, str]] = {
    "rules": "the faults partition, loss and reset; link.loss",
    "rate": "the fault rate; link.rate",
    "queues": "the faults delay, reorder, duplicate and corrupt; link.delay",
    "offload": "link.offload = false",
}
PROBES: Final[dict[Capability, Callable[[], None]]] = {
    "rules": _rules, "rate": _rate, "queues": _queues, "offload": _offload,
}  # fmt: skip


def _tried(probe: Callable[[], None]) -> str:
    try:
        probe()
    except (TestbedError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def main() -> None:
    """In a namespace of its own."""
    from pyroute2 import IPRoute  # noqa: PLC0415

    with IPRoute() as netlink:
        netlink.link("set", index=socket.if_nametoindex("lo"), state="up")
    sys.stdout.write(json.dumps({name: _tried(probe) for name, probe in PROBES.items()}))


if __name__ == "__main__":
    main()
