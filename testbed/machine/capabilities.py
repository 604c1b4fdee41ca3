"""What this machine is and what it can do, found out by trying and never by looking at version numbers alone.

Rule 1: a capability is probed by using it the way a run uses it; the answer is "" or a line with the reason.
Rule 2: a probe leaves nothing behind; one that could hurt this process runs in a child.
Rule 3: a run whose scenario needs what is missing is refused before anything is started.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import psutil

from testbed.errors import MachineCannotError
from testbed.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.scenario.document import Scenario

REPORTED_PACKAGES: Final = ("ballast", "grpcio", "numpy", "protobuf", "pydantic", "xxhash")
PROBE_S: Final = 20.0  # each probe is a process of a second
# Beside guest RAM: four Python processes with gRPC and numpy, chunks in flight, page hashes.
PROCESSES_BYTES: Final = 768 << 20
LINUX_RAM: Final = "/dev/shm"  # noqa: S108 - where User-Mode Linux keeps its RAM, as a file without a name


def facts() -> dict[str, Any]:
    """Versions, kernel and size of this machine, for manifests and results."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "versions": {name: version(name) for name in REPORTED_PACKAGES},
    }


def available_bytes() -> int:
    """Memory that the machine can give a run now."""
    return int(psutil.virtual_memory().available)


def needed_bytes(scenario: Scenario) -> int:
    """Guest RAM on both hosts and what the processes need beside it."""
    return 2 * scenario.guest.memory + PROCESSES_BYTES


def require(scenario: Scenario) -> None:
    """Raises MachineCannotError with everything that this machine lacks for the scenario."""
    missing = list(lacks(scenario))
    if missing:
        raise MachineCannotError(*missing)


def lacks(scenario: Scenario) -> Iterator[str]:
    """What stands in the way of running the scenario here, one line each."""
    if sys.platform != "linux":
        yield f"guest memory and sockets need Linux, this is {sys.platform}"
        return
    needed, available = needed_bytes(scenario), available_bytes()
    yield from _lacks_for_faults(scenario)
    if scenario.hosts.kind == "docker":
        from testbed.hosts import docker_machine  # noqa: PLC0415 - the SDK is slow to import

        yield from docker_machine.lacks(scenario, needed_bytes=needed, available_bytes=available)
        return
    if needed > available:
        yield (
            f"a {format_bytes(scenario.guest.memory)} guest on two hosts needs {format_bytes(needed)} of "
            f"memory and {format_bytes(available)} are available; choose a smaller guest.memory"
        )
    for probe in (probe_memfd, probe_sock_diag):
        reason = probe()
        if reason:
            yield reason
    if scenario.guest.kind == "linux":
        yield from _lacks_for_linux(scenario)
    migration = scenario.migration
    if migration.tracker == "uffd" or (migration.hints and not scenario.rehearses):
        reason = probe_tracker()
        if reason:
            yield (
                f"tracking the guest's writes in the kernel: {reason}; it needs Linux 6.7, or use "
                "migration.tracker = 'hash' with skip = 'none' or 'zero'"
            )


def _lacks_for_faults(scenario: Scenario) -> Iterator[str]:
    wanted = {fault.kind: fault for fault in (*scenario.link.faults(), *scenario.fault)}
    for kind, fault in wanted.items():
        if reason := fault.lacks():
            yield f"the fault {kind}: {reason}"
    if not scenario.link.offload:
        from testbed.faults import probing  # noqa: PLC0415 - only for such scenarios

        if reason := probing.lacks("offload"):
            yield f"link.offload: {reason}"


def _lacks_for_linux(scenario: Scenario) -> Iterator[str]:
    for reason in (probe_linux_guest(), probe_freezing()):
        if reason:
            yield reason
    free = shutil.disk_usage(LINUX_RAM).free
    if free < scenario.guest.memory:
        yield (
            f"{LINUX_RAM} has {format_bytes(free)} left for the RAM of a Linux guest of "
            f"{format_bytes(scenario.guest.memory)}"
        )


def probe_linux_guest() -> str:
    """The programs of a stock Linux guest, and the right to run them apart."""
    from linux_guest import probe  # noqa: PLC0415 - only for such guests

    return probe.programs() or probe.namespace()


def probe_freezing() -> str:
    """A control group freezer, with which a Linux guest is paused."""
    from linux_guest import probe  # noqa: PLC0415

    return probe.freezing()


def probe_memfd() -> str:
    """Sealed shared memory without a file: guest RAM."""
    try:
        fd = os.memfd_create("ballast-probe", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (OSError, AttributeError) as error:
        return f"memfd_create: {error}"
    os.close(fd)
    return ""


@functools.cache  # a kernel does not change while we run; the probe costs a quarter of a second
def probe_tracker() -> str:
    """Asynchronous write protection (userfaultfd) and PAGEMAP_SCAN, in a child that tracks a write."""
    command = [sys.executable, "-m", "testbed.machine.tracker_probe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the probe did not end: {error}"
    if done.returncode == 0:
        return done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    return f"the probe failed: {lines[-1] if lines else f'status {done.returncode}'}"


def probe_sock_diag() -> str:
    """TCP_INFO of a connection by netlink: the wire bytes of local runs. Counts a real byte on loopback."""
    from host.wire import TcpMeter  # noqa: PLC0415 - netlink is loaded by those who probe it

    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        try:
            meter = TcpMeter(f"{host}:{port}")
            with socket.create_connection((host, port)) as client, listener.accept()[0]:
                client.sendall(b"?")
                counted = meter.sample()
        except Exception as error:  # noqa: BLE001 - netlink errors have no common base; the reason is the answer
            return f"TCP_INFO by sock_diag: {error}"
    return "" if counted.tx_bytes == 1 else f"TCP_INFO counts {counted.tx_bytes} bytes where 1 was sent"
