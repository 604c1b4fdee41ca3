"""`memory`: a container's memory limit is lowered; what does not fit is killed by the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from testbed.faults.fault import Fault, Scope
from testbed.faults.victims import container_of
from testbed.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host

LIMIT_BYTES_MIN = 6 << 20  # engines refuse less


class Memory(Fault):
    """`limit` until it is healed, then what it was."""

    kind: Literal["memory"]
    limit: Annotated[int, BeforeValidator(parse_bytes), Field(ge=LIMIT_BYTES_MIN)]
    scope: ClassVar[Scope] = "container"

    def apply(self, target: Target) -> Undo:
        """Lowers it."""
        container = container_of(target.host)
        before, _ = container.limits()
        container.limit(memory_bytes=self.limit)
        return {"origin": target.origin, "memory_bytes": before}

    @classmethod
    def handed_down(cls, undo: Undo, later: Sequence[Undo]) -> Undo | None:
        """Nothing, where a later one is in force at the same host."""
        heir = next((one for one in later if one["origin"] == undo["origin"]), None)
        if heir is None:
            return undo
        heir["memory_bytes"] = undo["memory_bytes"]
        return None

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Sets it back."""
        container = container_of(hosts[undo["origin"]])
        if container.alive:
            container.limit(memory_bytes=undo["memory_bytes"])
        return {}
