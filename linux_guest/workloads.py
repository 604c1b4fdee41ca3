"""What a Linux guest does: a few programs of its own, started over its console.

Rule 1: only what really happens in the guest has a name here; rates that a shell cannot keep are not offered.
Rule 2: when `set_up` returns, everything that is written once is written; what goes on, goes on in the background.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from linux_guest.errors import WorkloadError
from linux_guest.marker import FIRST_NUMBER, PAGE_BYTES, Marker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linux_guest.ram_file import RamFile
    from linux_guest.uml import LinuxGuest

FILE_BYTES: Final = 1 << 20
FILL_S: Final = 300.0  # a tmpfs of some GiB is written at 100 MB/s and more
OPTIONS: Final[dict[str, frozenset[str]]] = {
    "idle": frozenset(),
    "freed": frozenset({"fraction", "keep"}),
    "marker": frozenset({"size", "exits"}),
    "rewriter": frozenset({"working_set", "pause"}),
}


@dataclass(slots=True)
class Workloads:
    """Started workloads: markers that live, and where the pages of those that have ended were."""

    alive: list[Marker] = field(default_factory=list)
    ended: list[Marker] = field(default_factory=list)

    def evidence(self) -> list[dict[str, Any]]:
        """The markers of a frozen guest: frame numbers, and how many pages have lost their content."""
        for marker in self.alive:
            marker.find_again()
        return [
            {
                "name": marker.name,
                "alive": marker in self.alive,
                "pfns": marker.pfns.tolist(),
                "lost_pages": len(marker.problems()) if marker in self.alive else 0,
            }
            for marker in (*self.alive, *self.ended)
        ]

    def check(self) -> tuple[int, list[str]]:
        """(pages of living markers that are right, a line for each that is not)."""
        wrong = {marker.name: marker.find_again() for marker in self.alive}
        problems = [
            f"page {index} of {name} is nowhere in RAM"
            for name, indices in wrong.items()
            for index in indices
        ]
        return sum(len(marker.pfns) for marker in self.alive) - len(problems), problems


def check_options(workloads: Sequence[dict[str, Any]]) -> None:
    """Raises WorkloadError for what a Linux guest cannot do."""
    for workload in workloads:
        name = workload.get("name")
        if name not in OPTIONS:
            raise WorkloadError(f"a Linux guest has no workload {name!r}: choose {', '.join(OPTIONS)}")
        unknown = set(workload) - OPTIONS[name] - {"name"}
        if unknown:
            raise WorkloadError(f"workload {name} has no option {min(unknown)!r}")


def set_up(guest: LinuxGuest, ram: RamFile, workloads: Sequence[dict[str, Any]]) -> Workloads:
    """Start them, in order. Raises GuestSilentError, WorkloadError."""
    check_options(workloads)
    started = Workloads()
    for index, workload in enumerate(workloads):
        match workload["name"]:
            case "freed":
                _free(guest, index, float(workload["fraction"]), float(workload.get("keep", 0.05)))
            case "marker":
                pages = int(workload["size"]) // PAGE_BYTES
                # Markers may be larger than any sensible gap; a billion pages are 4 TiB.
                marker = Marker(guest, ram, pages, f"marker{index}", FIRST_NUMBER + index * 10**9)
                marker.start()
                (started.ended if workload.get("exits") else started.alive).append(marker)
            case "rewriter":
                _rewrite(guest, index, int(workload["working_set"]), int(workload.get("pause", 0)))
    for marker in started.ended:  # last, so that nobody else gets their pages
        marker.end()
    return started


def _free(guest: LinuxGuest, index: int, fraction: float, keep: float) -> None:
    """Fill a part of memory with random data, and free it again but for files spread all over it."""
    files = int(fraction * guest.memory_bytes) // FILE_BYTES
    kept = int(keep * guest.memory_bytes) // FILE_BYTES
    folder = f"/tmp/freed{index}"  # noqa: S108 - in the guest
    guest.sh(
        f"mkdir {folder}; i=0; while [ $i -lt {files} ]; do "
        f"dd if=/dev/urandom of={folder}/$i bs={FILE_BYTES} count=1 2>/dev/null || exit 1; i=$((i+1)); done",
        FILL_S,
    )
    kept_numbers = np.unique(np.linspace(0, max(files - 1, 0), kept, dtype=int)).tolist() if files else []
    pattern = "|".join(str(number) for number in kept_numbers) or "-"
    guest.sh(f"cd {folder}; for f in *; do case $f in {pattern}) ;; *) rm $f ;; esac; done", FILL_S)


def _rewrite(guest: LinuxGuest, index: int, working_set: int, pause_ms: int) -> None:
    """Write a file in memory over and over, as fast as the guest can, with a pause after each pass."""
    path, count = f"/tmp/rewritten{index}", max(1, working_set // FILE_BYTES)  # noqa: S108 - in the guest
    write = f"dd if=/dev/urandom of={path} bs={FILE_BYTES} count={count} conv=notrunc 2>/dev/null"
    guest.sh(write, FILL_S)
    guest.sh(f"(while :; do {write}; usleep {pause_ms * 1000}; done) & echo")
