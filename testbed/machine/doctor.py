"""What this machine can do, what it lacks, and for which feature that matters.

Rule 1: every line was found out by trying (capabilities.py), and says what to do about a lack.
Rule 2: only what local runs cannot do without makes the machine unfit.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from testbed.faults import probing
from testbed.machine import capabilities, container_checkups
from testbed.machine.checkup import Checkup
from testbed.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

DEMO_BYTES: Final = 2 * (1 << 30) + capabilities.PROCESSES_BYTES
PAGEMAP_SCAN_KERNEL: Final = (6, 7)


def examine() -> list[Checkup]:
    """Probes everything."""
    return [
        _python(),
        _kernel(),
        _tried(
            "memfd",
            capabilities.probe_memfd(),
            required=True,
            works="sealed shared memory works",
            needed_for="guest memory",
            remedy="run on Linux, outside a sandbox that forbids memfd_create",
        ),
        _tried(
            "userfaultfd WP_ASYNC",
            capabilities.probe_tracker(),
            works="a tracked write was found by PAGEMAP_SCAN",
            needed_for="skip hint or both; fast dirty tracking",
            remedy="be root or set vm.unprivileged_userfaultfd=1; in a container pass /dev/userfaultfd",
        ),
        _memory(),
        _tried(
            "TCP_INFO (sock_diag)",
            capabilities.probe_sock_diag(),
            required=True,
            works="counted one byte on loopback",
            needed_for="bytes on the wire of local runs",
            remedy="load the kernel modules tcp_diag and inet_diag",
        ),
        _tried(
            "User-Mode Linux",
            capabilities.probe_linux_guest(),
            works="kernel, balloon driver and a static busybox",
            needed_for="guest.kind = 'linux', and the tests against the stock driver",
            remedy="as root: apt-get install user-mode-linux busybox-static",
        ),
        _tried(
            "cgroup freezer",
            capabilities.probe_freezing(),
            works="froze a process",
            needed_for="guest.kind = 'linux': the guest is frozen at the end",
            remedy="be root, or have a control group of your own",
        ),
        *container_checkups.examine(),
        *(
            _tried(
                f"network faults: {capability}",
                probing.lacks(capability),
                works="worked in a network namespace of its own",
                needed_for=needed_for,
                remedy="as root: apt-get install nftables util-linux; kernel options are in docs/faults",
            )
            for capability, needed_for in probing.NEEDED_FOR.items()
        ),
    ]


def fit(checkups: Sequence[Checkup]) -> bool:
    """Whether local runs are possible."""
    return all(checkup.ok for checkup in checkups if checkup.required)


def to_dict(checkups: Sequence[Checkup]) -> dict[str, Any]:
    """For --json."""
    return {
        "schema": 1,
        "fit": fit(checkups),
        "machine": capabilities.facts(),
        "checks": [asdict(checkup) for checkup in checkups],
    }


def _tried(
    name: str, lack: str, *, works: str, needed_for: str, remedy: str, required: bool = False
) -> Checkup:
    """What a probe found: `lack` is its reason, "" where nothing is missing."""
    return Checkup(name, not lack, required, found=lack or works, needed_for=needed_for, remedy=remedy)


def _python() -> Checkup:
    return Checkup(
        "Python",
        ok=sys.version_info >= (3, 11),
        required=True,
        found=platform.python_version(),
        needed_for="everything",
        remedy="use Python 3.11 or newer",
    )


def _kernel() -> Checkup:
    release = platform.release()
    numbers = [int(part) if part.isdecimal() else 0 for part in release.split("-")[0].split(".")[:2]]
    linux = sys.platform == "linux"
    new_enough = linux and tuple(numbers) >= PAGEMAP_SCAN_KERNEL
    return Checkup(
        "Linux >= 6.7",
        ok=new_enough,
        required=False,
        found=f"{platform.system()} {release}",
        needed_for="PAGEMAP_SCAN, the kernel's dirty tracking (skip hint or both)",
        remedy="use a newer kernel, or tracker = 'hash' with skip none or zero",
    )


def _memory() -> Checkup:
    available = capabilities.available_bytes()
    return Checkup(
        "free memory",
        ok=available >= DEMO_BYTES,
        required=False,
        found=f"{format_bytes(available)} available",
        needed_for=f"the demo: {format_bytes(DEMO_BYTES)} for its 1 GiB guest on two hosts",
        remedy="ballast demo --memory 256MiB",
    )
