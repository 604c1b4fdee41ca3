"""Faults that set another limit of a container, for as long as they are in force: `memory` and `slow`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from testbed.faults.fault import Fault, Scope
from testbed.faults.victims import container_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


class LimitFault(Fault):
    """A kind says what it sets; what was there is set again when it is healed."""

    scope: ClassVar[Scope] = "container"

    @property
    @abstractmethod
    def limits(self) -> dict[str, Any]:
        """What it sets, by the names of `Limits`."""

    def apply(self, target: Target) -> Undo:
        """Sets it."""
        container = container_of(target.host)
        before = container.limits()._asdict()
        container.limit(**self.limits)
        return {"origin": target.origin, **{key: before[key] for key in self.limits}}

    @classmethod
    def handed_down(cls, undo: Undo, later: Sequence[Undo]) -> Undo | None:
        """Nothing, where a later one is in force at the same host."""
        heir = next((one for one in later if one["origin"] == undo["origin"]), None)
        if heir is None:
            return undo
        heir |= undo
        return None

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Sets it back."""
        container = container_of(hosts[undo["origin"]])
        if container.alive:
            container.limit(**{key: value for key, value in undo.items() if key != "origin"})
        return {}
