"""`[link]` in force: offloads first, then the faults that make it, at every host, until the run ends.

Rule 1: a host whose network was rebuilt gets everything again.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from testbed.errors import MachineCannotError
from testbed.faults import offload
from testbed.faults.fault import Applied, Port, Target, apply, ports_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.history import History, Origin
    from testbed.host_handles import Host
    from testbed.scenario.link_keys import Link


class ShapedLink:
    """The hosts' network as the scenario wants it. Raises FaultError where it cannot be had."""

    def __init__(
        self, link: Link, hosts: Mapping[Origin, Host], history: History, *, label: str, seed: int
    ) -> None:
        self._link = link
        self._hosts = hosts
        self._history = history
        self._label = label
        self._seed = seed
        self._in_force: dict[Origin, tuple[Port, dict[str, bool], list[Applied]]] = {}

    def apply(self) -> None:
        """At every host, or at none."""
        with ExitStack() as undoing:
            undoing.callback(self.heal)
            for origin in self._hosts:
                self._apply_at(origin)
            undoing.pop_all()

    def renew(self, origin: Origin) -> None:
        """At a host whose interface is a new one."""
        if origin in self._in_force:
            self._heal_at(origin)
            self._apply_at(origin)

    def heal(self) -> None:
        """Everything is as it was."""
        with ExitStack() as healing:
            for origin in tuple(self._in_force):
                healing.callback(self._heal_at, origin)

    def _apply_at(self, origin: Origin) -> None:
        if not self._link.shaped:
            return
        port = Port.of(self._hosts[origin])
        if port is None:
            raise MachineCannotError(f"[link]: the network of the {origin} is not on this machine")
        before: dict[str, bool] = {}
        applied: list[Applied] = []
        self._in_force[origin] = (port, before, applied)
        if not self._link.offload:
            before |= offload.write(port.pid, port.address, dict.fromkeys(offload.FEATURES, False))
        for index, fault in enumerate(self._link.faults()):
            label = f"{self._label}_link{index}"
            seed = self._seed + 16 * (len(self._in_force) + index)
            applied.append(apply(fault, Target(self._hosts, origin, label, seed, ports_of(self._hosts))))
        facts: dict[str, Any] = self._link.facts()
        offloads = offload.read(port.pid, port.address)
        self._history.note("link_shaped", host=origin, **facts, offloads=offloads)

    def _heal_at(self, origin: Origin) -> None:
        port, before, applied = self._in_force.pop(origin)
        with ExitStack() as healing:
            if before and offload.is_there(port.pid, port.address):
                healing.callback(offload.write, port.pid, port.address, before)
            for one in applied:
                healing.callback(one.heal, self._hosts)
