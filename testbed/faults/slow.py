"""`slow`: a container gets less processor time than it had (CPU quota)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from testbed.faults.limits import LimitFault


class Slow(LimitFault):
    """`cpus` until it is healed, then what it was."""

    kind: Literal["slow"]
    cpus: Annotated[float, Field(ge=0.01, le=1024, strict=False)]

    @property
    def limits(self) -> dict[str, Any]:
        """The quota."""
        return {"cpus": self.cpus}
