"""The scenario's `[[fault]]` tables: what goes wrong, when, and for how long.

Rule 1: each kind declares its own parameters (testbed/faults); a key that its kind does not have is an error.
Rule 2: `at` is needed in a scenario: a time after the request, a round, or a point (testbed/faults/parameters.py).
Rule 3: hosts that are processes of this machine have no network of their own and no limits: what needs those is
        refused here.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

from pydantic import BeforeValidator, Field

from testbed.faults.fault import Fault, kinds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

KINDS: Final = kinds()
FAULTS_MAX: Final = 100  # a story that people read; random faults are the simulator's
DOCKER: Final = "needs hosts.kind = 'docker': hosts that are processes of this machine have no {}"
MISSING: Final = {
    "network": "network of their own",
    "container": "network to leave and no limits",
    "process": "container",
}

if TYPE_CHECKING:
    AnyFault: TypeAlias = Fault
elif len(KINDS) > 1:
    AnyFault = Annotated[reduce(or_, KINDS.values()), Field(discriminator="kind")]
elif KINDS:
    (AnyFault,) = KINDS.values()
else:

    def _refuse(_: object) -> Fault:
        raise ValueError("no kind of fault is known: install the package, its entry points name them")

    AnyFault = Annotated[Fault, BeforeValidator(_refuse)]


def fault_conflicts(
    faults: Sequence[Fault], hosts_kind: str, origins: Collection[str], legs: int
) -> Iterator[tuple[str, str]]:
    """What is wrong with faults that are right by themselves, as (path, problem)."""
    for index, fault in enumerate(faults):
        path = f"fault.{index}"
        yield from ((f"{path}.{key}", problem) for key, problem in fault.conflicts())
        if not fault.at:
            yield (
                f"{path}.at",
                'is missing; write a time ("500ms"), "round 2", or a point such as "commit.sent"',
            )
        if fault.lasting_ms == 0:
            yield f"{path}.for", "is 0: it would be healed before it harms anybody"
        if fault.leg is not None and fault.leg > legs:
            yield f"{path}.leg", f"there is no leg {fault.leg}: this scenario has {legs}"
        if fault.origin not in origins:
            yield f"{path}.host", f"'{fault.origin}' is no host of this scenario: it has {', '.join(origins)}"
        if fault.needs_containers and hosts_kind == "local":
            yield f"{path}.kind", f"'{fault.kind}' {DOCKER.format(MISSING[fault.scope])}"


def restarted(faults: Sequence[Fault]) -> frozenset[str]:
    """Processes that are started again after they end: nobody needs to give a run up for them."""
    return frozenset(fault.restarts for fault in faults) - {""}
