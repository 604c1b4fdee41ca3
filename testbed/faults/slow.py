"""`slow`: a container gets less processor time than it had (CPU quota)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from testbed.faults.fault import Fault, Scope
from testbed.faults.victims import container_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


class Slow(Fault):
    """`cpus` until it is healed, then what it was."""

    kind: Literal["slow"]
    cpus: Annotated[float, Field(ge=0.01, le=1024, strict=False)]
    scope: ClassVar[Scope] = "container"

    def apply(self, target: Target) -> Undo:
        """Sets the quota."""
        container = container_of(target.host)
        _, before = container.limits()
        container.limit(cpus=self.cpus)
        return {"origin": target.origin, "cpus": before}

    @classmethod
    def handed_down(cls, undo: Undo, later: Sequence[Undo]) -> Undo | None:
        """Nothing, where a later one is in force at the same host."""
        heir = next((one for one in later if one["origin"] == undo["origin"]), None)
        if heir is None:
            return undo
        heir["cpus"] = undo["cpus"]
        return None

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Sets it back."""
        container = container_of(hosts[undo["origin"]])
        if container.alive:
            container.limit(cpus=undo["cpus"])
        return {}
