"""The run's own network: a bridge of one engine, or one on each of two machines with published ports in between.

Rule 1: on one engine the network is internal: hosts reach each other and nothing else.
Rule 2: between two engines every host publishes its migration port, and is reached at its machine's address.
Rule 3: addresses are fixed, so that a host that was disconnected comes back with its own.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from docker.errors import APIError
from docker.types import IPAMConfig, IPAMPool

from testbed.errors import RunBrokenError
from testbed.hosts import subnets
from testbed.hosts.engine import Engine, innermost, told

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from ipaddress import IPv4Network

    from testbed.history import History, Origin
    from testbed.hosts.container import RunContainer

MIGRATION_PORT: Final = 7601
SUBNET_TRIES: Final = 16
FIRST_HOST: Final = 2  # of a subnet's addresses; the engine's bridge has the one before
ANY_PORT: Final = 9  # of a datagram that is never sent: which address would it leave from?


class RunNetwork:
    """One engine's bridge, and the addresses of the hosts on it."""

    def __init__(
        self,
        engine: Engine,
        run_id: str,
        *,
        alone: bool,
        number: int,
        origins: Sequence[Origin],
        labels: Mapping[str, str],
        history: History,
    ) -> None:
        self.engine = engine
        self.alone = alone
        self.handle, self.subnet = self._make(run_id, number, dict(labels))
        self.addresses = {origin: str(self.subnet[FIRST_HOST + at]) for at, origin in enumerate(origins)}
        history.note("network_made", network=self.handle.name, subnet=str(self.subnet), internal=alone)

    @property
    def gateway(self) -> str:
        """This bridge's own address: the engine's machine, as containers on it see it."""
        return str(self.subnet[1])

    @property
    def ports(self) -> dict[int, int | None]:
        """What containers publish, on ports that the engine chooses."""
        return {} if self.alone else {MIGRATION_PORT: None}

    def reached_at(self, origin: Origin, container: RunContainer, other: RunNetwork | None) -> str:
        """Where hosts on `other` (None: on this one) reach a host's Migration service."""
        if other is None:
            return f"{self.addresses[origin]}:{MIGRATION_PORT}"
        port = container.published(MIGRATION_PORT)
        if self.engine.machine:
            return f"{self.engine.machine}:{port}"
        if other.engine.machine:  # this machine, as that one sees it
            return f"{_address_towards(other.engine.machine)}:{port}"
        return f"{other.gateway}:{port}"  # two engines of this machine

    def remove(self) -> None:
        """When its containers are gone."""
        with told(f"the network {self.handle.name} cannot be removed"):
            self.handle.remove()

    def _make(self, run_id: str, number: int, labels: dict[str, str]) -> tuple[Any, IPv4Network]:
        """The engine has the last word on which subnets are free."""
        with told("the engine's networks cannot be listed"):
            taken = [*subnets.of_engine(self.engine.client.networks.list()), *subnets.of_routes()]
        refusals: list[str] = []
        free = subnets.candidates(taken, f"{run_id}{number}")
        for subnet, _ in zip(free, range(SUBNET_TRIES), strict=False):
            pool = IPAMPool(subnet=str(subnet), gateway=str(subnet[1]))
            try:
                network = self.engine.client.networks.create(
                    f"ballast-{run_id}",
                    driver="bridge",
                    internal=self.alone,
                    labels=labels,
                    ipam=IPAMConfig(pool_configs=[pool]),
                    # An interface's name has at most 15 characters.
                    options={"com.docker.network.bridge.name": f"blst{number}-{run_id}"},
                )
            except APIError as error:  # another run was faster
                refusals.append(innermost(error))
                continue
            return network, subnet
        raise RunBrokenError(
            f"the run's network cannot be made: {'; '.join(refusals) or 'no subnet is free'}"
        )


def _address_towards(machine: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((machine, ANY_PORT))  # sends nothing
        return str(probe.getsockname()[0])
