"""`disconnect`: a container is taken off the run's network, and put back with the same address.

Its interface is gone meanwhile; afterwards it is a new one that counts from 0. What `[link]` says is set up again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from testbed.faults.fault import Fault, Scope
from testbed.faults.victims import container_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


class Disconnect(Fault):
    """Until it is healed."""

    kind: Literal["disconnect"]
    scope: ClassVar[Scope] = "container"

    @property
    def rebuilds_network(self) -> bool:
        """The interface is a new one."""
        return True

    def apply(self, target: Target) -> Undo:
        """Takes it off."""
        container_of(target.host).disconnect()
        return {"origin": target.origin}

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Puts it back."""
        container_of(hosts[undo["origin"]]).connect()
        return {}
