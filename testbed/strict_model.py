"""What every part of a scenario has in common."""

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """Common rules: strict, frozen, closed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
