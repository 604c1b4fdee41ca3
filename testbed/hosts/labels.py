"""What every container, network and volume of a run carries, so that `ballast clean` knows its own.

Rule 1: an object is a run's by its labels alone, never by its name.
Rule 2: the labels name the run's runtime directory, whose lock proves that the run lives, and the machine and user
        whose directory that is: on a shared engine nobody touches what another machine or user started.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.history import Origin

RUN: Final = "ballast.run"
RUNTIME: Final = "ballast.runtime"
OWNER: Final = "ballast.owner"
ORIGIN: Final = "ballast.host"
MACHINE_ID: Final = Path("/etc/machine-id")


def owner() -> str:
    """This user on this machine."""
    machine = MACHINE_ID.read_text(encoding="ascii").strip() if MACHINE_ID.exists() else ""
    return f"{os.getuid()}@{machine or platform.node()}"


def of_run(run_id: str, runtime: Path, origin: Origin | None = None) -> dict[str, str]:
    """The labels of an object of this run, and of one of its hosts."""
    labels = {RUN: run_id, RUNTIME: str(runtime), OWNER: owner()}
    return labels if origin is None else {**labels, ORIGIN: origin}


def run_of(labels: Mapping[str, str]) -> tuple[str, Path] | None:
    """(run, its runtime directory) of an object that is ours, else None."""
    if labels.get(OWNER) != owner() or RUN not in labels or RUNTIME not in labels:
        return None
    return labels[RUN], Path(labels[RUNTIME])
