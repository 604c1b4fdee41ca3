"""Local hosts, each in a network namespace of its own, joined by a veth: interfaces without containers.

Rule 1: addresses are of the benchmarking range (198.18.0.0/15), in namespaces that nobody else is in.
Rule 2: everything ends with the processes that hold the namespaces.
"""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.hosts import local
from testbed.run import runner

SUBNET = "198.18.254"
ADDRESSES = {"source": f"{SUBNET}.1", "dest": f"{SUBNET}.2"}
PORT = 47_001


def why_not():
    """Why namespaces cannot be made here, or ""."""
    if os.geteuid():
        return "be root, for network namespaces of its own"
    missing = [tool for tool in ("unshare", "nsenter", "ip", "ethtool") if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}: apt-get install iproute2 util-linux ethtool" if missing else ""


needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Network:
    """Two namespaces, held by two processes, joined by a veth."""

    def __init__(self, holders):
        self.pids = {origin: holder.pid for origin, holder in zip(ADDRESSES, holders, strict=True)}
        self.generation = 0

    def inside(self, origin, *command):
        subprocess.run(["nsenter", f"--net=/proc/{self.pids[origin]}/ns/net", *command], check=True)

    def join(self, *, offload=True):
        """A new pair of interfaces, which count from 0."""
        self.generation += 1
        names = {origin: f"bl{self.generation}{origin[0]}" for origin in ADDRESSES}
        near, far = ADDRESSES
        subprocess.run(
            ["ip", "link", "add", names[near], "netns", str(self.pids[near]), "type", "veth", "peer", "name",
             names[far], "netns", str(self.pids[far])],
            check=True,
        )  # fmt: skip
        for origin, name in names.items():
            self.inside(origin, "ip", "addr", "add", f"{ADDRESSES[origin]}/30", "dev", name)
            self.inside(origin, "ip", "link", "set", name, "up")
            self.inside(origin, "ip", "link", "set", "lo", "up")
            if not offload:
                self.inside(origin, "ethtool", "-K", name, "tso", "off", "gso", "off", "gro", "off")

    def part(self):
        """The interfaces are gone, and their counters with them; first down, as container engines do it."""
        self.inside("dest", "ip", "link", "set", f"bl{self.generation}d", "down")
        self.inside("source", "ip", "link", "set", f"bl{self.generation}s", "down")
        self.inside("source", "ip", "link", "del", f"bl{self.generation}s")


@contextmanager
def network(*, offload=True):
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "600"]) for _ in ADDRESSES]
    try:
        own = Path("/proc/self/ns/net").stat().st_ino
        for holder in holders:
            while Path(f"/proc/{holder.pid}/ns/net").stat().st_ino == own:
                os.sched_yield()
        joined = Network(holders)
        joined.join(offload=offload)
        yield joined
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def live_in(joined, monkeypatch):
    """Lets runs start their local hosts inside `joined`; they speak TLS, as they must beyond loopback."""

    class NamespacedHosts(local.LocalHosts):
        def _process(self, name, module_and_arguments):
            origin = name.partition("-")[0]
            words = [
                f"{ADDRESSES[origin]}:{PORT}" if word == local.ANY_PORT else word
                for word in module_and_arguments
            ]
            netns = f"--net=/proc/{joined.pids[origin]}/ns/net"
            process = local.OwnedProcess(
                name,
                ["nsenter", netns, local.sys.executable, "-m", *words, "--die-with-parent"],
                log=self._run_dir.logs / f"{name}.log",
                environment=self._environment,
                on_exit=self._exited,
            )
            self._history.note("process_started", process=name, pid=process.pid)
            return process

        def _start(self, stack, origin):
            host = super()._start(stack, origin)
            host.network_pid = joined.pids[origin]
            return host

    def open_hosts(scenario, run_id, **parts):
        return NamespacedHosts(scenario, run_id, **parts)

    monkeypatch.setattr(runner, "open_hosts", open_hosts)
