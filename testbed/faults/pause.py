"""`pause`: a node, a guest agent or a whole container stands still, and then goes on as if nothing had been.

A process is stopped by SIGSTOP, a container by the engine's freezer. Nobody is told: its peers see silence, their
kernel's TCP goes on acknowledging until buffers are full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from testbed.faults.victims import VictimFault, container_of, process_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


class Pause(VictimFault):
    """Until it is healed."""

    kind: Literal["pause"]

    def stops_node_of(self, origin: Origin) -> bool:
        """Whether that host's node stands still, and answers nobody."""
        return self.origin == origin and self.what != "guest_agent"

    def apply(self, target: Target) -> Undo:
        """Stops it."""
        if self.what == "container":
            container_of(target.host).pause()
        else:
            process_of(target.host, self.what).pause()
        return {"origin": target.origin, "what": self.what}

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Lets it go on, if it is still there."""
        host = hosts[undo["origin"]]
        if undo["what"] == "container":
            if container_of(host).alive:
                container_of(host).unpause()
        else:
            process_of(host, undo["what"]).resume()
        return {}
