"""The link between the two hosts of a crash cell, to be cut and healed.

Rule 1: hosts with a network of their own lose it by a fault of testbed/faults; hosts that share the loopback have a
        relay between them, for whose sake the source is told another address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from testbed.crashes.relay import Relay
from testbed.faults.fault import Applied, Target, apply, parse_fault, ports_of
from testbed.hosts.local import LocalHost

if TYPE_CHECKING:
    from testbed.host_handles import Hosts


class Link(Protocol):
    """A context manager."""

    def cut(self) -> None:
        """Nothing passes any more."""

    def heal(self) -> None:
        """It does again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class PartitionedLink:
    """Packets between hosts with networks of their own vanish."""

    def __init__(self, hosts: Hosts, label: str) -> None:
        self._hosts = hosts
        self._label = label
        self._in_force: Applied | None = None

    def cut(self) -> None:
        """Both ways."""
        hosts = self._hosts.hosts
        target = Target(hosts, "dest", self._label, ports=ports_of(hosts))
        self._in_force = apply(parse_fault("partition", {"host": "dest"}), target)

    def heal(self) -> None:
        """Idempotent."""
        applied, self._in_force = self._in_force, None
        if applied is not None:
            applied.heal(self._hosts.hosts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()


def link_of(hosts: Hosts, label: str) -> Link:
    """The link of these hosts, before a migration is asked for."""
    dest = hosts.dest
    if not isinstance(dest, LocalHost):
        return PartitionedLink(hosts, label)
    relay = Relay(dest.migration_address)
    dest.migration_address = relay.address
    return relay
