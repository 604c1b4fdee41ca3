"""How the processes of a host are started: the same command lines here and in a container.

Rule 1: every path is as the process sees it; who starts it says where that is.
Rule 2: a host has both roles, so that it can give a guest away that it took in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from testbed.host_handles import SHORT_NAMES

if TYPE_CHECKING:
    from pathlib import Path, PurePath

    from testbed.history import Origin
    from testbed.scenario.document import Scenario

ROLES: Final = ("source", "dest")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a host's processes find and leave things."""

    vhost_socket: PurePath
    agent_socket: PurePath
    control: str
    node_dir: PurePath
    beats: PurePath
    oracle: PurePath
    markers: PurePath
    workloads: PurePath

    @property
    def sockets(self) -> list[str]:
        """How node and agent find each other."""
        return ["--vhost-socket", str(self.vhost_socket), "--agent-socket", str(self.agent_socket)]


def node_arguments(
    scenario: Scenario,
    origin: Origin,
    places: Places,
    *,
    migration_address: str,
    tls_dir: PurePath | None = None,
) -> list[str]:
    """Module and arguments of a node. Without TLS beyond loopback it is told that this is wanted."""
    trust = [] if tls_dir is None else ["--tls-dir", str(tls_dir)]
    return [
        "host", "--name", SHORT_NAMES[origin], *(word for role in ROLES for word in ("--role", role)),
        *places.sockets, "--run-dir", str(places.node_dir),
        "--journal", str(places.node_dir / "journal.sqlite"),
        "--control", places.control, "--migration-address", migration_address,
        "--guest-memory-max", str(scenario.hosts.guest_memory_max),
        *(trust if migration_address.startswith("127.") or tls_dir is not None else [*trust, "--insecure"]),
    ]  # fmt: skip


def agent_arguments(scenario: Scenario, origin: Origin, places: Places, *, standby: bool) -> list[str]:
    """Module and arguments of a guest agent. A Linux guest is at the source; who waits for it waits in vain."""
    linux = scenario.guest.kind == "linux" and origin == "source"
    arguments = [
        "linux_guest" if linux else "guest_agent", "--name", SHORT_NAMES[origin], *places.sockets,
        "--memory", str(scenario.guest.memory), "--seed", str(scenario.seed),
        "--beats", str(places.beats), "--oracle", str(places.oracle),
    ]  # fmt: skip
    if standby:
        return [*arguments, "--standby"]
    if linux:
        arguments += ["--markers", str(places.markers)]
    return [*arguments, "--workloads", str(places.workloads)]


def write_workloads(scenario: Scenario, path: Path) -> None:
    """The file that `--workloads` names: what the guest does and what its balloon driver is to be."""
    chosen = [workload.model_dump() for workload in scenario.guest.workload]
    guest = {"workloads": chosen, "balloon": scenario.balloon.driver_options()}
    path.write_text(json.dumps(guest, indent=2), encoding="utf-8")
