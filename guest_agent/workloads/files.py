"""A page cache full of real files.

Rule 1: file pages are read once, during set-up, and never change; the oracle has a sum of each page.
Rule 2: a page that leaves the cache (evicted by the scenario, or reclaimed under pressure) is recorded as
        such, so that a page which is missing without a record is a lost page.
Rule 3: the cache gives pages back whenever an allocation falls short: it is a cache.
"""

import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from guest_agent.arrays import PAGE_BYTES, PAGE_WORDS, U8Array, U64Array
from guest_agent.errors import WorkloadError
from guest_agent.frames import FrameKind
from guest_agent.oracle import VALUE_KIND_FIRST, Expectations
from guest_agent.pressure import PRESSURE_CACHE
from guest_agent.workloads.base import IDLE_NS, Guest, Workload, problem_line, register_integer
from guest_agent.workloads.content import chunks_of, generator_at, stream_key, word_sums
from guest_agent.workloads.options import Options

KIND_PAGE_SUM: Final = VALUE_KIND_FIRST  # per cache page: its sum, or GONE
GONE: Final = 0

PYTHON_STDLIB: Final = "python-stdlib"
_SKIPPED_DIRECTORIES: Final = {"__pycache__", "site-packages", "dist-packages"}  # differ from host to host
_BYTES_MAX_DEFAULT: Final = 64 << 20  # what a small guest has room for beside its workload
_RECLAIM_PAGES_MIN: Final = 256  # finding the cache's pages costs a look at the frame table: make it count


class Files(Workload):
    """Options: directory (a path or "python-stdlib"), evict (a share of the files), bytes_max."""

    kind = "files"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        super().__init__(name, workload_id, options)
        directory = options.text("directory", PYTHON_STDLIB)
        self._directory = Path(sysconfig.get_path("stdlib") if directory == PYTHON_STDLIB else directory)
        self._evict = options.share("evict", 0.0)
        self._bytes_max = options.size("bytes_max", _BYTES_MAX_DEFAULT)

    def set_up(self, guest: Guest) -> None:
        """Read the files, then evict a seeded selection of them."""
        plan = list(_plan(self._directory, self._bytes_max // PAGE_BYTES))
        if not plan:
            raise WorkloadError(
                f"workload {self.name}: no files of at most {self._bytes_max} bytes in {self._directory}"
            )
        ends = np.cumsum([pages for _, pages in plan])
        pfns = self.allocate(guest, int(ends[-1]), FrameKind.CACHE)
        sums = np.empty(pfns.size, dtype=np.uint64)
        for (path, pages), end in zip(plan, ends.tolist(), strict=True):
            words = _read(path, pages).view(np.uint64)
            guest.ram.words[pfns[end - pages : end]] = words
            sums[end - pages : end] = word_sums(words)
        guest.oracle.append(self.id, KIND_PAGE_SUM, np.arange(pfns.size, dtype=np.uint32), sums)
        self.operations = len(plan)
        self._attach(guest)
        chosen = generator_at(stream_key(guest.seed, self.name), 0).permutation(len(plan))
        evicted = np.zeros(len(plan), dtype=bool)
        evicted[chosen[: round(self._evict * len(plan))]] = True
        self._drop(pfns[np.repeat(evicted, [pages for _, pages in plan])])

    def _attach(self, guest: Guest) -> None:
        self._guest = guest
        guest.buddy.add_pressure_hook(PRESSURE_CACHE, self._reclaim)

    def _reclaim(self, pages_wanted: int) -> int:
        with self._guest.buddy.lock:  # two threads short of memory must not drop the same pages
            pfns = self._guest.frames.pfns_of(self.id)[: max(pages_wanted, _RECLAIM_PAGES_MIN)]
            self._drop(pfns)
        return int(pfns.size)

    def _drop(self, pfns: U64Array) -> None:
        indices = self._guest.frames.index[pfns.astype(np.int64)]  # a copy: freed entries may be reused
        self._guest.buddy.free_bulk(pfns)
        gone = np.full(indices.size, GONE, dtype=np.uint64)
        self._guest.oracle.append(self.id, KIND_PAGE_SUM, indices, gone)

    def step(self, now_ns: int) -> int:
        """Do nothing: the files only have to stay."""
        del now_ns
        return IDLE_NS

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Offer the cache to the restored guest's allocator."""
        self.operations = register_integer(self.name, registers, "operations")
        self._attach(guest)

    def check(self, expected: Expectations) -> list[str]:
        """Every page that did not leave the cache is there, with its sum."""
        items, values, problems = self.expected_of(expected, KIND_PAGE_SUM)
        present = values != GONE
        items, values = items[present], values[present]
        pfns = self._guest.frames.pfns_of(self.id)
        indices = self._guest.frames.index[pfns.astype(np.int64)]
        if not np.array_equal(indices, items):
            problems.append(problem_line("pages are not in the cache", np.setdiff1d(items, indices)))
            problems.append(problem_line("pages are in the cache unexpectedly", np.setdiff1d(indices, items)))
            return problems
        found = [word_sums(self._guest.ram.words[chunk]) for _, chunk in chunks_of(pfns)]
        altered = items[np.concatenate([np.empty(0, dtype=np.uint64), *found]) != values]
        if altered.size:
            problems.append(problem_line("cached pages are altered", altered))
        return problems


def _plan(directory: Path, pages_max: int) -> Iterator[tuple[Path, int]]:
    """Files in a fixed order with their sizes in pages, as many as fit."""
    left = pages_max
    for root, directories, names in os.walk(directory):
        directories[:] = sorted(set(directories) - _SKIPPED_DIRECTORIES)
        for name in sorted(names):
            path = Path(root, name)
            if path.is_symlink() or not path.is_file():
                continue
            pages = -(-path.stat().st_size // PAGE_BYTES)
            if 0 < pages <= left:
                left -= pages
                yield path, pages


def _read(path: Path, pages: int) -> U8Array:
    """A file's content in whole pages, the rest of the last one zero: uint8, shape (pages, 4096)."""
    content = np.zeros((pages, PAGE_WORDS * 8), dtype=np.uint8)
    try:
        with path.open("rb") as file:
            file.readinto(content.reshape(-1).data)
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror}") from error
    return content
