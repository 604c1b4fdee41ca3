"""Two hosts' networks without hosts: a pair of network namespaces joined by a veth, made and removed by a test.

Rule 1: addresses are of the benchmarking range (198.18.0.0/15), in namespaces nobody else is in.
Rule 2: a socket is opened inside and used from anywhere: it stays where it was opened.
"""

import os
import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.faults.namespace import in_namespace, namespace_of

TOOLS = ("unshare", "ip", "tc", "nft")


def why_not() -> str:
    """Why namespaces cannot be made here, or ""."""
    if os.geteuid():
        return "be root, for network namespaces of its own"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}: apt-get install iproute2 nftables util-linux" if missing else ""


needs_namespaces = pytest.mark.skipif(bool(why_not()), reason=why_not())


class Side:
    """One of the two namespaces."""

    def __init__(self, pid, interface, address):
        self.pid, self.interface, self.address = pid, interface, address

    def run(self, *command):
        """A program inside."""
        path = namespace_of(self.pid)
        done = in_namespace(
            path, lambda: subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def inside(self, action):
        """What `action` returns, called inside."""
        return in_namespace(namespace_of(self.pid), action)

    def read(self, name):
        """A file of /proc/net, as it is inside."""
        return self.inside(Path("/proc/thread-self/net", name).read_text)

    def udp(self):
        """A bound UDP socket inside, with room for a test's packets."""
        opened = self.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        opened.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        opened.bind((self.address, 0))
        opened.settimeout(10)
        return opened

    def listen(self):
        """A listening TCP socket inside."""
        return self.inside(lambda: socket.create_server((self.address, 0)))

    def connect(self, address):
        """A TCP connection from inside."""
        return self.inside(lambda: socket.create_connection(address, 10))

    def state(self):
        """Everything that a fault might leave behind: qdiscs, rules, addresses, links, offloads, queues."""
        return {
            "qdiscs": self.run("tc", "qdisc", "show"),
            "rules": self.run("nft", "list", "ruleset"),
            "links": self.run("ip", "-o", "link"),
            "addresses": self.run("ip", "-4", "-o", "addr"),
            "routes": self.run("ip", "route"),
            "queues": self.read("netfilter/nfnetlink_queue"),
        }


@contextmanager
def pair():
    """(a, b): two namespaces that reach each other."""
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "600"]) for _ in range(2)]
    try:
        own = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
        for holder in holders:
            while os.stat(namespace_of(holder.pid)).st_ino == own:  # noqa: PTH116
                os.sched_yield()
        a, b = holders
        subprocess.run(
            ["ip", "link", "add", "bla", "netns", str(a.pid), "type", "veth", "peer", "name", "blb",
             "netns", str(b.pid)],
            check=True,
        )  # fmt: skip
        sides = Side(a.pid, "bla", "198.18.255.1"), Side(b.pid, "blb", "198.18.255.2")
        for side in sides:
            side.run("ip", "addr", "add", f"{side.address}/30", "dev", side.interface)
            side.run(
                "ip", "link", "set", side.interface, "addrgenmode", "none"
            )  # no IPv6: it comes by and by
            side.run("ip", "link", "set", side.interface, "up")
            side.run("ip", "link", "set", "lo", "up")
        for side in sides:  # the kernel looks at a new link's carrier by and by
            while "state UP" not in side.run("ip", "-o", "link", "show", side.interface):
                os.sched_yield()
        yield sides
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
