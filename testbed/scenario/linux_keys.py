"""What a scenario may say of a Linux guest: its own workloads, and what goes together with it.

Rule 1: a Linux guest does what a shell in it can do, and nothing is imitated: workloads of the other kind of guest
        are refused here, and the other way round.
Rule 2: it goes on at the source whatever happens, so every migration of it is a rehearsal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator

from testbed.documents import Model
from testbed.scenario.balloon_keys import Balloon
from testbed.units import format_bytes, parse_bytes, parse_duration_ms

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
DurationMs = Annotated[int, BeforeValidator(parse_duration_ms)]

BOTH_KINDS: Final = ("idle", "freed")
LINUX_ONLY: Final = ("marker", "rewriter")
LINUX_MEMORY_MIN: Final = 96 << 20  # the kernel, its file system and a shell take 30 MiB
REHEARSAL_OUTCOMES: Final = ("rehearsal", "cancelled", "failed")


class Marker(Model):
    """A process that owns pages at known frame numbers; with `exits` it has ended before the migration."""

    name: Literal["marker"]
    size: Bytes
    exits: bool = False

    def kept_bytes(self, memory_bytes: int) -> int:
        """Its pages, and those through which they came."""
        return self.size + (1 << 20)


class Rewriter(Model):
    """Writes a file in memory over and over with random data, pausing after each pass."""

    name: Literal["rewriter"]
    working_set: Bytes
    pause: DurationMs = 20

    def kept_bytes(self, memory_bytes: int) -> int:
        """The file."""
        return self.working_set


def kind_conflicts(kind: str, names: Sequence[str], memory_bytes: int) -> Iterator[tuple[str, str]]:
    """Workloads that this kind of guest cannot do, and a memory too small for it."""
    for index, name in enumerate(names):
        of_linux = name in LINUX_ONLY
        if name not in BOTH_KINDS and of_linux is not (kind == "linux"):
            other = "a Linux guest" if of_linux else "the guest of kind 'ballast'"
            yield f"guest.workload.{index}.name", f"'{name}' is a workload of {other} alone"
    if kind == "linux" and memory_bytes < LINUX_MEMORY_MIN:
        yield "guest.memory", f"a Linux guest needs {format_bytes(LINUX_MEMORY_MIN)} at least"


def linux_conflicts(tracker: str, balloon: Balloon | None, expect: object) -> Iterator[tuple[str, str]]:
    """What does not go together with a Linux guest."""
    if tracker == "uffd":
        yield "migration.tracker", "'uffd' cannot see the writes of a Linux guest; use 'auto' or 'hash'"
    if balloon is not None:
        defaults = Balloon().driver_options()
        for key, value in balloon.driver_options().items():
            if value != defaults[key]:
                yield f"balloon.{key}", "is the Linux driver's own choice"
    if expect not in REHEARSAL_OUTCOMES:
        yield (
            "expect",
            f"a Linux guest cannot leave its host: it can be one of {', '.join(REHEARSAL_OUTCOMES)}",
        )
