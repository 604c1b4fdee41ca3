"""The scenario's `[[leg]]` tables: where the guest goes, one migration after the other.

Rule 1: hosts are a, b and c; the guest boots on a. Without any leg it goes to b once.
Rule 2: a leg is a whole migration: it has every key of `[migration]`, and says only what differs from there.
Rule 3: the legs are made within `run.settle` of each other, or within the leg's own `settle`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator

from testbed.host_handles import SHORT_NAMES
from testbed.scenario.migration_keys import Migration, limit_conflicts
from testbed.units import parse_duration_ms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from testbed.history import Origin

HostName = Literal["a", "b", "c"]
ORIGINS: Final[dict[str, Origin]] = {name: origin for origin, name in SHORT_NAMES.items()}
FIRST_HOST: Final = "a"
LEGS_MAX: Final = 16  # each is a whole migration, with its own proof


class Leg(Migration):
    """One migration of the guest to another host."""

    to: HostName
    settle: Annotated[int, BeforeValidator(parse_duration_ms)] | None = None  # before it; None: run.settle


def with_migration_keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario's document with every leg completed by what `[migration]` says (Rule 2)."""
    legs, migration = document.get("leg"), document.get("migration")
    if not isinstance(legs, list | tuple) or not isinstance(migration, dict):
        return dict(document)
    shared = {key: value for key, value in migration.items() if key in Migration.model_fields}
    return {
        **document,
        "leg": [{**shared, **leg} if isinstance(leg, dict) else leg for leg in legs],
    }


def leg_conflicts(legs: Sequence[Leg], *, linux: bool) -> Iterator[tuple[str, str]]:
    """What is wrong across legs, as (path, problem)."""
    if legs and linux:
        yield "leg", "a linux guest only rehearses: it cannot go anywhere"
    here = FIRST_HOST
    for index, leg in enumerate(legs):
        if leg.to == here:
            yield f"leg.{index}.to", f"the guest is on {here} then: name another host"
        if leg.rehearsal:
            yield f"leg.{index}.rehearsal", "a rehearsal goes nowhere: it is no leg"
        if leg.unsafe_clear_dirty_log_at_hint:
            yield (
                f"leg.{index}.unsafe_clear_dirty_log_at_hint",
                "an experiment that loses writes is a run of its own: it is no leg",
            )
        yield from limit_conflicts(leg, f"leg.{index}")
        here = leg.to
