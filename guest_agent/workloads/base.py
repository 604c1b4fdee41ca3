"""What every workload is.

Rule 1: a step is bounded (some milliseconds) and at its end RAM and oracle agree; the guest is paused, saved
        and checked only between steps.
Rule 2: the data is in guest RAM; which pages hold it is read from the frame table. Registers carry counters
        only.
Rule 3: a fresh page is written wholly in the step that allocates it: it may have been hinted and hold
        anything.
Rule 4: check() judges RAM by the oracle's last records, never by what this process remembers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from guest_agent.arrays import U32Array, U64Array
from guest_agent.buddy import BuddyAllocator
from guest_agent.errors import OutOfMemory, RestoreError, WorkloadError
from guest_agent.frames import FrameKind, FrameTable
from guest_agent.oracle import Expectations, OracleLog
from guest_agent.ram import GuestRam
from guest_agent.workloads.options import Options

NS_PER_S: Final = 1_000_000_000
IDLE_NS: Final = NS_PER_S
_CATCH_UP_NS_MAX: Final = NS_PER_S // 10  # a pause or a throttled stretch is not made up for
_BATCH_NS: Final = 2_000_000  # work is collected for so long: batches are what makes it cheap
_ITEMS_NAMED: Final = 4


@dataclass(frozen=True, slots=True)
class Guest:
    """What a workload runs on; seed is the run's."""

    ram: GuestRam
    frames: FrameTable
    buddy: BuddyAllocator
    oracle: OracleLog
    seed: int


class Workload(ABC):
    """One workload of the guest.

    Attributes:
        kind: the scenario's name for this sort of workload (of the class).
        name: unique in the guest. id: owner number of its pages. operations: done so far, all hosts together.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        """Take the options this kind knows; the registry then refuses the others."""
        del options
        self.name = name
        self.id = workload_id
        self.operations = 0

    @abstractmethod
    def set_up(self, guest: Guest) -> None:
        """Allocate and write what the workload works on; may take seconds.

        Raises:
            WorkloadError: this guest or machine cannot hold it.
        """

    @abstractmethod
    def step(self, now_ns: int) -> int:
        """Work for some milliseconds at most; returns the nanoseconds until there is more to do."""

    def registers(self) -> dict[str, Any]:
        """Counters that belong to the vCPU state: small and JSON-able."""
        return {"operations": self.operations}

    @abstractmethod
    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Go on in a restored guest.

        Raises:
            RestoreError: registers or frame table are not those of this workload.
        """

    @abstractmethod
    def check(self, expected: Expectations) -> list[str]:
        """Compare RAM with what the oracle says; problems, none when all is as expected."""

    def allocate(self, guest: Guest, pages: int, kind: FrameKind = FrameKind.ANON) -> U64Array:
        """Pages for a set-up.

        Raises:
            WorkloadError: the guest has not so many.
        """
        try:
            return guest.buddy.alloc_bulk(pages, kind=kind, owner=self.id)
        except OutOfMemory as error:
            raise WorkloadError(f"workload {self.name}: {error}") from error

    def owned_pages(self, guest: Guest, pages: int) -> U64Array:
        """The workload's pages in a restored guest by index, which must run from 0 to pages - 1.

        Raises:
            RestoreError: they do not.
        """
        pfns = guest.frames.pfns_of(self.id)
        indices = guest.frames.index[pfns.astype(np.int64)]
        if pfns.size != pages or not np.array_equal(indices, np.arange(pages, dtype=np.uint32)):
            raise RestoreError(f"workload {self.name}: the frame table has {pfns.size} of its {pages} pages")
        return pfns

    def expected_of(self, expected: Expectations, kind: int) -> tuple[U32Array, U64Array, list[str]]:
        """Items and versions of one kind, and what is wrong with the log itself."""
        items, versions = expected.get(
            (self.id, kind), (np.empty(0, dtype=np.uint32), np.empty(0, dtype=np.uint64))
        )
        broken = expected.inconsistent.get((self.id, kind))
        problems: list[str] = []
        if broken is not None:
            problems.append(problem_line("versions in the oracle do not rise by one", broken))
        return items, versions, problems


def problem_line(what: str, items: U32Array | U64Array) -> str:
    """One line about some items: how many, and the first few."""
    named = ", ".join(str(item) for item in items[:_ITEMS_NAMED].tolist())
    more = ", ..." if items.size > _ITEMS_NAMED else ""
    return f"{what}: {items.size} items ({named}{more})"


class Pacer:
    """Turns a rate into batches: how many operations are due now."""

    def __init__(self, per_second: float, batch_max: int) -> None:
        self._per_second = per_second
        self._batch_max = batch_max
        self._credit = 0.0
        self._last_ns: int | None = None  # clocks of two hosts are not compared: the first look starts anew

    def take(self, now_ns: int) -> int:
        """Operations due at now_ns, at most one batch."""
        last_ns = now_ns if self._last_ns is None else self._last_ns
        self._last_ns = now_ns
        elapsed_ns = min(max(now_ns - last_ns, 0), _CATCH_UP_NS_MAX)
        self._credit += elapsed_ns * self._per_second / NS_PER_S
        due = min(int(self._credit), self._batch_max)
        # What a slow machine cannot do in time is dropped, but for one batch: no burst ever follows.
        self._credit = min(self._credit - due, float(self._batch_max))
        return due

    def wait_ns(self) -> int:
        """Nanoseconds until the next batch is worth a step."""
        if self._per_second <= 0:
            return IDLE_NS
        if self._credit >= self._batch_max:
            return 0
        first_ns = int((1 - min(self._credit, 1.0)) * NS_PER_S / self._per_second)
        return min(max(first_ns, _BATCH_NS), _CATCH_UP_NS_MAX // 2)


def register_integer(name: str, registers: Mapping[str, Any], key: str) -> int:
    """One counter of saved registers.

    Raises:
        RestoreError: it is missing or no counter.
    """
    value = registers.get(key)
    if type(value) is not int or value < 0:
        raise RestoreError(f"workload {name}: register {key} is {value!r}")
    return value
