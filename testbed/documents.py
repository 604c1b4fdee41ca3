"""What all documents have in common: the scenario, which people write, and what is told of a run."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Of a document that is written: closed and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Part):
    """Of a document that people write: a value is taken as it is, or refused."""

    model_config = ConfigDict(strict=True)
