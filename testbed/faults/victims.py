"""What `pause` and `kill` happen to: a host's node, its guest agent, or all of it.

Rule 1: source_node and dest_node are the nodes of the hosts of these names; a guest agent or a container is of the
        host that the fault names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeAlias

from testbed.faults.errors import FaultError
from testbed.faults.fault import Fault, Scope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.history import Origin
    from testbed.host_handles import Host, HostContainer, HostProcess

What: TypeAlias = Literal["source_node", "dest_node", "guest_agent", "container"]
NODES: Final[dict[str, Origin]] = {"source_node": "source", "dest_node": "dest"}


class VictimFault(Fault):
    """Base of `pause` and `kill`."""

    scope: ClassVar[Scope] = "process"
    what: What

    @property
    def origin(self) -> Origin:
        """The host that it happens to; a guest is at the source at first."""
        return NODES.get(self.what) or self.host or ("source" if self.what == "guest_agent" else "dest")

    @property
    def needs_containers(self) -> bool:
        """Processes can be had everywhere."""
        return self.what == "container"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """A node has a host already."""
        if self.what in NODES and self.host not in (None, NODES[self.what]):
            yield "host", f"what = '{self.what}' is of the host '{NODES[self.what]}'; leave host out"


def process_of(host: Host, what: str) -> HostProcess:
    """The node or the agent."""
    return host.agent if what == "guest_agent" else host.node


def container_of(host: Host) -> HostContainer:
    """Raises FaultError where the host is none."""
    if host.container is None:
        raise FaultError(f"the {host.origin} is no container")
    return host.container
