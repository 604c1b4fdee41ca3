"""What dead runs left in Docker engines: containers, networks and volumes with our labels.

Rule 1: an object is ours when its labels name a run of this user on this machine, and it is left behind when that
        run is dead (labels.py); names decide nothing.
Rule 2: a run writes down which engines it uses before it uses them; those are looked into, and the engine that
        `docker` itself would take.
Rule 3: before an object is removed its labels are read again: an id is never enough.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from docker.errors import DockerException, NotFound

from testbed.errors import MachineCannotError, UsageError
from testbed.hosts import labels
from testbed.hosts.engine import LOOK_S, connect, innermost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from testbed.hosts.engine import Engine

ENGINES_NAME: Final = "engines.json"
# In the order in which they can be removed: nothing is in use by what comes later.
KINDS: Final = ("container", "network", "volume")


@dataclass(frozen=True, slots=True)
class LeftObject:
    """A container, network or volume of a dead run."""

    kind: str
    name: str
    key: str  # the engine's id; of a volume its name
    run: str
    context: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} of run {self.run}"


def write_down(runtime: Path, contexts: list[str]) -> None:
    """Notes in a run's runtime directory which engines it uses; `find` looks there."""
    (runtime / ENGINES_NAME).write_text(json.dumps(contexts), encoding="utf-8")


def contexts_of(runtime: Path) -> list[str]:
    """The contexts that a run used; none where its hosts were local."""
    try:
        written = json.loads((runtime / ENGINES_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a run that was killed while it wrote had not begun
        return []
    return [str(context) for context in written]


def find(
    dead_runtimes: list[Path], is_dead: Callable[[str, Path], bool]
) -> tuple[list[LeftObject], list[str]]:
    """(what is left, what could not be looked into): one line for each engine that a dead run used and is away."""
    used = {context for runtime in dead_runtimes for context in contexts_of(runtime)}
    left: list[LeftObject] = []
    problems: list[str] = []
    seen: set[str] = set()
    for context in sorted({"", *used}):
        try:
            engine = connect(context, timeout_s=LOOK_S)
        except (MachineCannotError, UsageError) as error:
            if context in used:
                problems.append(f"{error}: what a dead run may have left there stays")
            continue
        try:
            if engine.engine_id not in seen:
                left += _left_in(engine, is_dead)
            seen.add(engine.engine_id)
        except (DockerException, OSError) as error:
            problems.append(f"{engine.address}: {innermost(error)}")
        finally:
            engine.close()
    return left, problems


def remove(left: LeftObject, is_dead: Callable[[str, Path], bool]) -> bool:
    """Removes it; False when it was gone, or is not a dead run's any more."""
    engine = connect(left.context)
    try:
        found = _collection(engine, left.kind).get(left.key)
        if _dead_run_of(found, is_dead) is None:
            return False
        if left.kind == "container":
            found.remove(force=True, v=True)
        else:
            found.remove()
    except NotFound:
        return False
    except (DockerException, OSError) as error:
        raise MachineCannotError(f"{left} cannot be removed: {innermost(error)}") from error
    finally:
        engine.close()
    return True


def _left_in(engine: Engine, is_dead: Callable[[str, Path], bool]) -> Iterator[LeftObject]:
    ours = {"label": f"{labels.OWNER}={labels.owner()}"}
    for kind in KINDS:
        everything = {"all": True} if kind == "container" else {}
        for found in _collection(engine, kind).list(filters=ours, **everything):
            run = _dead_run_of(found, is_dead)
            if run is not None:
                yield LeftObject(kind, str(found.name), str(found.id), run, engine.context)


def _dead_run_of(found: Any, is_dead: Callable[[str, Path], bool]) -> str | None:
    attributes = found.attrs.get("Labels") or found.attrs.get("Config", {}).get("Labels") or {}
    named = labels.run_of(attributes)
    return named[0] if named is not None and is_dead(*named) else None


def _collection(engine: Engine, kind: str) -> Any:
    return getattr(engine.client, f"{kind}s")
