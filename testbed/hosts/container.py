"""The container that is a host: small, without privileges, and on the run's network with an address of its own.

Rule 1: everything runs as an ordinary user, without capabilities, on a read-only root, and can gain nothing.
        One word is said as root, without capabilities: the container's own /dev/userfaultfd is opened to its user.
Rule 2: its first process only waits: node and agent are started beside it, so that each can die and come back.
Rule 3: what was disconnected is connected again with the same address.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from testbed.errors import RunBrokenError
from testbed.host_handles import Limits
from testbed.hosts.container_process import INSIDE
from testbed.hosts.engine import told
from testbed.hosts.execution import run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testbed.hosts.engine import Engine
    from testbed.scenario.document import Scenario

DEVICE: Final = Path("/dev/userfaultfd")
OPEN_DEVICE: Final = f"[ ! -c {DEVICE} ] || chmod 0666 {DEVICE}"
DATA: Final = "/var/lib/ballast"  # the node's own directory, and what the agent writes
TLS: Final = "/run/ballast-tls"
WAIT: Final = ["sleep", "infinity"]
PERIOD_US: Final = 100_000
PIDS_MAX: Final = 512  # a node has about 60 threads, an agent ten
UNLIMITED: Final = -1
# A process that is root here becomes this one inside: an id that no user of the machine has.
NOBODY_ELSES_ID: Final = 10001
OOM_COUNTS: Final = (
    "cat /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control 2>/dev/null || true"
)


def inside_user() -> int:
    """The user inside a container: the one who started the run, or nobody in particular where that is root."""
    return os.getuid() or NOBODY_ELSES_ID


class RunContainer:
    """A host's container (HostContainer)."""

    def __init__(self, engine: Engine, container: Any, network: Any, address: str) -> None:
        self.engine = engine
        self.handle = container
        self.address = address
        self.on_start: Callable[[], None] | None = None
        self._network = network

    @classmethod
    def make(
        cls,
        engine: Engine,
        image: str,
        name: str,
        *,
        scenario: Scenario,
        network: Any,
        address: str,
        labels: Mapping[str, str],
        mounts: Mapping[str, str],
        ports: Mapping[int, int | None],
    ) -> RunContainer:
        """Makes it; `begin` starts it. Raises RunBrokenError."""
        hosts = scenario.hosts
        limits: dict[str, Any] = {}
        if hosts.memory:
            limits |= {"mem_limit": hosts.memory, "memswap_limit": hosts.memory}
        if hosts.cpus:
            limits |= _quota(hosts.cpus)
        # Elsewhere nobody can look; whether the kernel tracks writes there is what the node's probe tells.
        has_device = DEVICE.exists() or not engine.local
        with told(f"the container {name} cannot be made"):
            container = engine.client.containers.create(
                image,
                WAIT,
                name=name,
                hostname=name,
                user=f"{inside_user()}:{inside_user()}",
                labels=dict(labels),
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                read_only=True,
                tmpfs={"/tmp": "size=64m,mode=1777"} | _unshared(mounts),  # noqa: S108 - the container's own
                devices=[f"{DEVICE}:{DEVICE}:rw"] if has_device else [],
                volumes={here: {"bind": there, "mode": "rw"} for here, there in mounts.items()},
                ports={f"{inside}/tcp": outside for inside, outside in ports.items()},
                network=network.name,
                networking_config={
                    network.name: engine.client.api.create_endpoint_config(ipv4_address=address)
                },
                healthcheck={"test": ["NONE"]},
                pids_limit=PIDS_MAX,
                **limits,
            )
        return cls(engine, container, network, address)

    @property
    def name(self) -> str:
        """As the engine knows it."""
        return str(self.handle.name)

    @property
    def alive(self) -> bool:
        """Whether it runs, paused or not."""
        return bool(self._state()["Running"])

    @property
    def pid(self) -> int:
        """Its first process, as this machine knows it; 0 when it does not run or is elsewhere."""
        return int(self._state()["Pid"]) if self.engine.local else 0

    @property
    def elsewhere(self) -> bool:
        """Whether its engine is another machine's: its network cannot be looked at from here."""
        return not self.engine.local

    def published(self, port: int) -> int:
        """The port of the engine's machine that leads to this one of the container."""
        self._state()
        found = (self.handle.attrs["NetworkSettings"]["Ports"] or {}).get(f"{port}/tcp")
        if not found:
            raise RunBrokenError(f"{self.name} does not publish port {port}: does its network allow it?")
        return int(found[0]["HostPort"])

    def begin(self) -> None:
        """Starts it and opens the device to its user."""
        with told(f"the container {self.name} cannot be started"):
            self.handle.start()
            status, said = run(self.handle, ["/bin/sh", "-c", OPEN_DEVICE], user="0:0")
        if status:
            raise RunBrokenError(f"the container {self.name} cannot open {DEVICE}: {said}")

    def pause(self) -> None:
        """Freezes all of it."""
        with told(f"the container {self.name} cannot be paused"):
            self.handle.pause()

    def unpause(self) -> None:
        """Thaws it, if it is frozen."""
        if not self._state()["Paused"]:
            return
        with told(f"the container {self.name} cannot be unpaused"):
            self.handle.unpause()

    def thaw(self) -> None:
        """Unpauses it where it is paused."""
        if self._state()["Paused"]:
            self.unpause()

    def kill(self) -> None:
        """The host dies, and its guest with it."""
        self.thaw()  # what stands still cannot be killed
        with told(f"the container {self.name} cannot be killed"):
            self.handle.kill()
            self.handle.wait()  # ends: it was killed; the engine has CALL_S

    def start(self) -> None:
        """The host starts again: the node with its journal, and an empty standby agent."""
        self.begin()
        if self.on_start is not None:
            self.on_start()

    def limit(self, *, memory_bytes: int | None = None, cpus: float | None = None) -> None:
        """Sets limits (0: none); what is None stays."""
        changed: dict[str, Any] = {}
        if memory_bytes is not None:
            # An engine cannot take a limit away; all memory of its machine is as good as none.
            limit = memory_bytes or self.engine.memory_bytes
            changed |= {"mem_limit": limit, "memswap_limit": limit}
        if cpus is not None:
            changed |= _quota(cpus)
        with told(f"the limits of {self.name} cannot be changed"):
            self.handle.update(**changed)

    def limits(self) -> Limits:
        """As they are set now."""
        self._state()
        config = self.handle.attrs["HostConfig"]
        quota, period = max(0, config.get("CpuQuota") or 0), config.get("CpuPeriod") or PERIOD_US
        memory_bytes = config.get("Memory") or 0
        return Limits(memory_bytes if memory_bytes < self.engine.memory_bytes else 0, quota / period)

    def disconnect(self) -> None:
        """Takes the host off the run's network."""
        with told(f"{self.name} cannot be disconnected"):
            self._network.disconnect(self.handle)

    def connect(self) -> None:
        """Puts it back, with the same address; the interface is a new one, and counts from 0. If it is off."""
        self._state()
        if self._network.name in self.handle.attrs["NetworkSettings"]["Networks"]:
            return
        with told(f"{self.name} cannot be connected"):
            self._network.connect(self.handle, ipv4_address=self.address)

    def out_of_memory_kills(self) -> int:
        """How many of its processes the kernel killed because its memory was spent."""
        state = self._state()
        if not state["Running"] or state["Paused"]:
            return int(bool(state["OOMKilled"]))
        with told(f"{self.name} cannot be looked into"):
            _, said = run(self.handle, ["/bin/sh", "-c", OOM_COUNTS])
        words = [line.split() for line in said.splitlines()]
        return sum(int(pair[1]) for pair in words if len(pair) == 2 and pair[0] == "oom_kill")

    def remove(self) -> None:
        """Ends and removes it."""
        with told(f"the container {self.name} cannot be removed"):
            self.handle.remove(force=True, v=True)

    def _state(self) -> dict[str, Any]:
        with told(f"the container {self.name} cannot be looked at"):
            self.handle.reload()
        state: dict[str, Any] = self.handle.attrs["State"]
        return state


def _quota(cpus: float) -> dict[str, int]:
    """As period and quota, which unlike "nano CPUs" can be changed later."""
    return {"cpu_period": PERIOD_US, "cpu_quota": int(cpus * PERIOD_US) or UNLIMITED}


def _unshared(mounts: Mapping[str, str]) -> dict[str, str]:
    """Where no directory of this machine can be shared the container has its own: sockets in memory."""
    if INSIDE in mounts.values():
        return {}
    return {INSIDE: f"size=1m,mode=0700,uid={inside_user()},gid={inside_user()}"}
