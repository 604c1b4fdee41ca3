"""`memory`: a container's memory limit is lowered; what does not fit is killed by the kernel."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from testbed.faults.limits import LimitFault
from testbed.units import parse_bytes

LIMIT_BYTES_MIN = 6 << 20  # engines refuse less


class Memory(LimitFault):
    """`limit` until it is healed, then what it was."""

    kind: Literal["memory"]
    limit: Annotated[int, BeforeValidator(parse_bytes), Field(ge=LIMIT_BYTES_MIN)]

    @property
    def limits(self) -> dict[str, Any]:
        """Memory, and swap with it."""
        return {"memory_bytes": self.limit}
