"""What a scenario may say: the experiment as one frozen document.

Rule 1: a key that is not declared here is an error; a value is taken as written, never adjusted.
Rule 2: quantities are held in base units (bytes, pages, milliseconds, bytes per second), see units.py.
Rule 3: what only makes sense together is checked together, in `conflicts`, and reported with its path.
Rule 4: one schema, both directions: manifest.json keeps `Scenario.model_dump()`, and judging reads it back.
"""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from testbed.documents import Model
from testbed.history import Origin
from testbed.scenario.balloon_keys import Balloon, balloon_conflicts
from testbed.scenario.fault_keys import FAULTS_MAX, AnyFault, fault_conflicts
from testbed.scenario.host_keys import Hosts
from testbed.scenario.leg_keys import LEGS_MAX, ORIGINS, Leg, leg_conflicts, with_migration_keys
from testbed.scenario.link_keys import Link, link_conflicts
from testbed.scenario.linux_keys import Marker, Rewriter, kind_conflicts, linux_conflicts
from testbed.scenario.migration_keys import Migration, migration_conflicts
from testbed.units import (
    PAGE_BYTES,
    format_bytes,
    parse_bytes,
    parse_duration_ms,
    parse_page_rate,
)

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
PagesPerSecond = Annotated[int, BeforeValidator(parse_page_rate)]
DurationMs = Annotated[int, BeforeValidator(parse_duration_ms)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Pattern = Literal["random", "sequential", "zipf"]

BLOCK_BYTES: Final = 4 << 20  # the largest buddy block (order 10), the granularity of a free page hint
MEMORY_BYTES_MIN: Final = 16 << 20  # below it boot page, rings and frame table leave no room for a workload
MEMORY_BYTES_MAX: Final = 1 << 40  # 32-bit frame numbers in the balloon's arrays end at 16 TiB; far enough
# Frame table and free maps take about 0.3 % of memory, rings a constant; the rest is slack that lets the
# allocator work and the hint driver hold blocks without starving the guest.
WORKLOAD_SHARE_MAX: Final = 0.92
KV_RECORD_BYTES: Final = 256


def _whole_blocks(memory_bytes: int) -> int:
    if not MEMORY_BYTES_MIN <= memory_bytes <= MEMORY_BYTES_MAX:
        limits = f"{format_bytes(MEMORY_BYTES_MIN)} .. {format_bytes(MEMORY_BYTES_MAX)}"
        raise ValueError(f"{format_bytes(memory_bytes)} is outside {limits}")
    if memory_bytes % BLOCK_BYTES:
        raise ValueError(f"{memory_bytes} bytes are not a whole number of 4 MiB blocks")
    return memory_bytes


MemoryBytes = Annotated[int, BeforeValidator(parse_bytes), AfterValidator(_whole_blocks)]


class Idle(Model):
    """Does nothing; the guest still beats its clock."""

    name: Literal["idle"]

    def kept_bytes(self, memory_bytes: int) -> int:
        """Memory that this workload holds or needs at its peak and that nobody can reclaim."""
        return 0


class Freed(Model):
    """Fills `fraction` of memory with incompressible data, keeps `keep` of memory, frees the rest."""

    name: Literal["freed"]
    fraction: Fraction
    keep: Fraction = 0.05

    def kept_bytes(self, memory_bytes: int) -> int:
        """The whole fraction: it is all in use before the rest is freed."""
        return int(self.fraction * memory_bytes)


class Files(Model):
    """Loads real files into the page cache and evicts a part; the cache gives way under pressure."""

    name: Literal["files"]
    directory: Annotated[str, Field(min_length=1)] = "python-stdlib"
    evict: Fraction = 0.0
    bytes_max: Bytes = 64 << 20

    def kept_bytes(self, memory_bytes: int) -> int:
        """Nothing: cache pages are reclaimable."""
        return 0


class Writer(Model):
    """Dirties pages of a working set at a stated rate."""

    name: Literal["writer"]
    rate: PagesPerSecond
    working_set: Bytes
    pattern: Pattern = "random"
    churn: Fraction = 0.0  # share of the written pages that move to fresh page frames

    def kept_bytes(self, memory_bytes: int) -> int:
        """The working set."""
        return self.working_set


class KeyValue(Model):
    """A key-value store whose records, versions and checksums live in guest memory."""

    name: Literal["kv"]
    records: Annotated[int, Field(ge=1, le=50_000_000)]
    operations_per_second: Annotated[int, Field(ge=0, le=10_000_000)]
    update_share: Fraction = 0.5  # the rest are reads
    pattern: Pattern = "zipf"

    def kept_bytes(self, memory_bytes: int) -> int:
        """The records."""
        return self.records * KV_RECORD_BYTES


class Build(Model):
    """Compilers: each fills an arena, rewrites it, leaves an object file in the page cache, and frees the arena."""

    name: Literal["build"]
    jobs: Annotated[int, Field(ge=1, le=64)] = 4
    arena: Annotated[Bytes, Field(ge=PAGE_BYTES)] = 32 << 20  # of one compiler
    object: Annotated[Bytes, Field(ge=PAGE_BYTES)] = 512 << 10  # of one object file
    objects: Annotated[int, Field(ge=1, le=65_536)] = 64
    headers: Annotated[Bytes, Field(ge=PAGE_BYTES)] = 64 << 20  # read by every compiler, never written
    passes: Annotated[int, Field(ge=1, le=200)] = 2  # over the arena, after it was filled
    reads: Annotated[int, Field(ge=1, le=1000)] = 8  # pages of the headers, for each page of progress
    rate: PagesPerSecond = 10_000  # pages of progress, of all compilers together

    def kept_bytes(self, memory_bytes: int) -> int:
        """Arenas, headers, and one object more than there are: it is written before the old one goes."""
        return self.jobs * self.arena + self.headers + (self.objects + 1) * self.object


class Retake(Model):
    """Takes hinted pages back and writes them before the device processes the hint (hazard 1, exactly)."""

    name: Literal["retake"]
    pages: Annotated[int, Field(ge=1, le=1024)] = 64  # a held block has 1024

    def kept_bytes(self, memory_bytes: int) -> int:
        """The pages it takes."""
        return self.pages * PAGE_BYTES


Workload = Annotated[
    Idle | Freed | Files | Writer | KeyValue | Build | Retake | Marker | Rewriter, Field(discriminator="name")
]
WORKLOADS: Final[dict[str, type[Model]]] = {
    "idle": Idle,
    "freed": Freed,
    "files": Files,
    "writer": Writer,
    "kv": KeyValue,
    "build": Build,
    "retake": Retake,
    "marker": Marker,
    "rewriter": Rewriter,
}


class Guest(Model):
    """The guest and what it does."""

    memory: MemoryBytes
    kind: Literal["ballast", "linux"] = (
        "ballast"  # "linux": a stock kernel in User-Mode Linux; it only rehearses
    )
    workload: Annotated[tuple[Workload, ...], Field(strict=False, max_length=16)] = ()


class Run(Model):
    """What happens around the migration."""

    settle: DurationMs = 300
    # The guest must be seen to beat after the migration: that takes some periods of 2 ms.
    run_on: Annotated[DurationMs, Field(ge=50)] = 500


class Scenario(Model):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,99}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    # "corruption": the guest arrives and the checkers find that writes were lost.
    expect: Literal["completed", "rehearsal", "cancelled", "failed", "guest_lost", "corruption"] = "completed"
    engine: Literal["ballast"] = "ballast"
    guest: Guest
    balloon: Balloon = Balloon()
    migration: Migration = Migration()
    leg: Annotated[tuple[Leg, ...], Field(strict=False, max_length=LEGS_MAX)] = ()  # see `legs`
    hosts: Hosts = Hosts()
    link: Link = Link()
    fault: Annotated[tuple[AnyFault, ...], Field(strict=False, max_length=FAULTS_MAX)] = ()
    run: Run = Run()

    @model_validator(mode="before")
    @classmethod
    def _complete_legs(cls, document: object) -> object:
        return with_migration_keys(document) if isinstance(document, dict) else document

    @property
    def legs(self) -> tuple[Leg, ...]:
        """The migrations to make, one after the other; a scenario without [[leg]] goes to b once."""
        return self.leg or (Leg.model_validate({**self.migration.model_dump(), "to": "b"}),)

    @property
    def origins(self) -> tuple[Origin, ...]:
        """The hosts that the run needs, as histories call them; the guest's first one first."""
        named = {ORIGINS[leg.to] for leg in self.leg}
        return ("source", "dest", *(("third",) if "third" in named else ()))

    @property
    def rehearses(self) -> bool:
        """Whether the guest goes on at the source whatever happens."""
        return self.migration.rehearsal or self.guest.kind == "linux"


SECTIONS: Final[dict[str, type[Model]]] = {
    "guest": Guest, "balloon": Balloon, "migration": Migration, "leg": Leg, "hosts": Hosts,
    "link": Link, "run": Run,
}  # fmt: skip


def conflicts(
    guest: Guest | None, balloon: Balloon | None, migration: Migration | None, expect: object = "completed"
) -> Iterator[tuple[str, str]]:
    """What is wrong across fields, as (path, problem); a section that is itself invalid is None."""
    if balloon is not None:
        hints = migration is not None and migration.hints
        yield from balloon_conflicts(balloon, migration_hints=hints)
    if migration is not None:
        yield from migration_conflicts(migration, expect)
    if guest is not None:
        yield from _memory_conflicts(guest)
        yield from kind_conflicts(guest.kind, [item.name for item in guest.workload], guest.memory)
    linux = guest is not None and guest.kind == "linux"
    if linux:
        yield from linux_conflicts(migration.tracker if migration is not None else "auto", balloon, expect)
    rehearsal = linux or (migration is not None and migration.rehearsal)
    if rehearsal is not (expect == "rehearsal") and expect not in ("cancelled", "failed") and not linux:
        yield "expect", "'rehearsal' and migration.rehearsal = true go together"
    if guest is not None and balloon is not None:
        ballooned = balloon.num_pages * PAGE_BYTES
        room = guest.memory - sum(item.kept_bytes(guest.memory) for item in guest.workload)
        if ballooned > max(0, room):
            left = format_bytes(max(0, room))
            problem = f"{format_bytes(ballooned)} do not fit beside the workloads: {left} are left"
            yield "balloon.num_pages", problem
    if migration is not None and migration.tracker == "hash" and migration.hints and not rehearsal:
        problem = (
            f"'hash' cannot be combined with skip = '{migration.skip}': it cannot see a page that was freed "
            "and came back with the same content; use skip 'none' or 'zero', or tracker 'uffd'"
        )
        yield "migration.tracker", problem


def conflicts_of_legs(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What is wrong in or across the legs of a scenario that is right otherwise, as (path, problem)."""
    yield from leg_conflicts(scenario.leg, linux=scenario.guest.kind == "linux")
    known = set(conflicts(None, scenario.balloon, scenario.migration, scenario.expect))
    for index, leg in enumerate(scenario.leg):
        for path, problem in conflicts(None, scenario.balloon, leg, scenario.expect):
            if (path, problem) not in known and path.startswith("migration."):
                yield f"leg.{index}.{path.removeprefix('migration.')}", problem


def conflicts_of_faults(scenario: Scenario) -> Iterator[tuple[str, str]]:
    """What is wrong with the link and the faults of a scenario that is right otherwise, as (path, problem)."""
    yield from link_conflicts(scenario.link, scenario.hosts.kind)
    yield from fault_conflicts(scenario.fault, scenario.hosts.kind, scenario.origins, len(scenario.legs))


def _memory_conflicts(guest: Guest) -> Iterator[tuple[str, str]]:
    for index, workload in enumerate(guest.workload):
        if isinstance(workload, Freed) and workload.keep > workload.fraction:
            problem = f"{workload.keep} of memory cannot be kept of the {workload.fraction} that are filled"
            yield f"guest.workload.{index}.keep", problem
        if isinstance(workload, Files) and workload.bytes_max > guest.memory * WORKLOAD_SHARE_MAX:
            yield (
                f"guest.workload.{index}.bytes_max",
                f"{format_bytes(workload.bytes_max)} do not fit into {format_bytes(guest.memory)} of memory",
            )
        if isinstance(workload, Writer) and workload.working_set < PAGE_BYTES:
            yield f"guest.workload.{index}.working_set", "is smaller than one page"
    needed = sum(workload.kept_bytes(guest.memory) for workload in guest.workload)
    if needed > guest.memory * WORKLOAD_SHARE_MAX:
        parts = ", ".join(
            f"{item.name} {format_bytes(item.kept_bytes(guest.memory))}"
            for item in guest.workload
            if item.kept_bytes(guest.memory)
        )
        problem = (
            f"the workloads need {format_bytes(needed)} ({parts}) and at most "
            f"{WORKLOAD_SHARE_MAX:.0%} of {format_bytes(guest.memory)} can be given to them"
        )
        yield "guest.workload", problem
