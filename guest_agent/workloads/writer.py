"""A guest that dirties memory at a stated rate over a stated working set.

Rule 1: page i at version v is a function of (seed, i, v): its index, its version, four stamps of (i, v) at
        places chosen by i, and content of i everywhere else. Every word of it is checked.
Rule 2: one write raises a page's version by one, as read from RAM: a page that came back older shows in the
        oracle as a version written twice, even if it is overwritten before anyone looks.
Rule 3: a page hit twice in one batch is written once; a batch is two milliseconds.
Rule 4: `churn` moves that share of the written pages to fresh page frames: memory is freed and taken back
        while the guest migrates, so that a hint which came too late loses a write that is checked.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from guest_agent.arrays import PAGE_BYTES, PAGE_WORDS, I64Array, U64Array, distinct
from guest_agent.frames import FrameKind
from guest_agent.oracle import Expectations
from guest_agent.workloads.base import Guest, Pacer, Workload, problem_line, register_integer
from guest_agent.workloads.choice import PATTERNS, Chooser
from guest_agent.workloads.content import PageContent, chunks_of, mix, stream_key
from guest_agent.workloads.options import Options

KIND_PAGE_VERSION: Final = 0
_WORD_INDEX: Final = 0
_WORD_VERSION: Final = 1
_STAMPS: Final = 4
_BATCH_PAGES_MAX: Final = 1024  # about 2 ms with every page's first write trapped


class Writer(Workload):
    """Options: rate (pages a second), working_set (bytes), pattern (random, sequential, zipf), churn."""

    kind = "writer"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        super().__init__(name, workload_id, options)
        self._rate = options.rate("rate")
        self._pages = -(-options.size("working_set") // PAGE_BYTES)
        self._pattern = options.choice("pattern", PATTERNS, "random")
        self._churn = options.share("churn", 0.0)

    def set_up(self, guest: Guest) -> None:
        """Write version 1 of every page."""
        pfns = self.allocate(guest, self._pages)
        self._attach(guest, pfns, batches=0)
        versions = np.ones(self._pages, dtype=np.uint64)
        for start, chunk in chunks_of(pfns):
            indices = np.arange(start, start + chunk.size, dtype=np.uint64)
            guest.ram.words[chunk] = self._page_content(indices, versions[: chunk.size])
        guest.oracle.append(self.id, KIND_PAGE_VERSION, np.arange(self._pages, dtype=np.uint32), versions)

    def _attach(self, guest: Guest, pfns: U64Array, batches: int) -> None:
        self._guest = guest
        self._pfns: I64Array = pfns.astype(np.int64)
        key = stream_key(guest.seed, self.name)
        self._salt = np.uint64(key >> 64)
        self._content = PageContent(key)
        self._chooser = Chooser(key, self._pattern, self._pages, batches)
        self._pacer = Pacer(self._rate, _BATCH_PAGES_MAX)

    def step(self, now_ns: int) -> int:
        """Write the pages that are due."""
        due = self._pacer.take(now_ns)
        if due:
            self._write(distinct(self._chooser.draw(due)))
            self.operations += due
        return self._pacer.wait_ns()

    def _write(self, indices: I64Array) -> None:
        words = self._guest.ram.words
        versions = words[self._pfns[indices], _WORD_VERSION] + np.uint64(1)
        moved = round(self._churn * indices.size)
        if moved:
            turn = self._chooser.batches * moved  # another part of the sorted indices each time
            indices, versions = np.roll(indices, turn), np.roll(versions, turn)
            self._move(indices[:moved], versions[:moved])
        staying = indices[moved:]
        pfns = self._pfns[staying]
        words[pfns, _WORD_VERSION] = versions[moved:]
        for places, stamps in self._stamps(staying.astype(np.uint64), versions[moved:]):
            words[pfns, places] = stamps
        self._guest.oracle.append(self.id, KIND_PAGE_VERSION, indices.astype(np.uint32), versions)

    def _move(self, indices: I64Array, versions: U64Array) -> None:
        guest = self._guest
        fresh = guest.buddy.alloc_bulk(indices.size, kind=FrameKind.ANON, owner=self.id).astype(np.int64)
        guest.ram.words[fresh] = self._page_content(indices.astype(np.uint64), versions)
        guest.frames.index[fresh] = indices
        old = self._pfns[indices].astype(np.uint64)
        self._pfns[indices] = fresh
        guest.buddy.free_bulk(old)

    def _stamps(self, indices: U64Array, versions: U64Array) -> list[tuple[I64Array, U64Array]]:
        """Places and values of each stamp; where two places are one, the later stamp stands."""
        seeds = mix(indices + self._salt)
        stamped = mix(seeds + versions)
        first = _WORD_VERSION + 1
        return [
            (
                (mix(seeds ^ np.uint64(number)) % np.uint64(PAGE_WORDS - first)).astype(np.int64) + first,
                stamped + np.uint64(number),
            )
            for number in range(_STAMPS)
        ]

    def _page_content(self, indices: U64Array, versions: U64Array) -> U64Array:
        content = self._content.pages(indices)
        content[:, _WORD_INDEX] = indices
        content[:, _WORD_VERSION] = versions
        rows = np.arange(indices.size)
        for places, stamps in self._stamps(indices, versions):
            content[rows, places] = stamps
        return content

    def registers(self) -> dict[str, Any]:
        """Operations and the number of batches drawn."""
        return super().registers() | {"batches": self._chooser.batches, "position": self._chooser.position}

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Find the pages again and go on with the next batch."""
        self.operations = register_integer(self.name, registers, "operations")
        pfns = self.owned_pages(guest, self._pages)
        self._attach(guest, pfns, register_integer(self.name, registers, "batches"))
        self._chooser.position = register_integer(self.name, registers, "position")

    def check(self, expected: Expectations) -> list[str]:
        """Every page has exactly the content of its last recorded version."""
        items, versions, problems = self.expected_of(expected, KIND_PAGE_VERSION)
        guest = self._guest
        pfns = guest.frames.pfns_of(self.id)
        if not np.array_equal(guest.frames.index[pfns.astype(np.int64)], items):
            problems.append(f"the oracle knows {items.size} pages, the frame table {pfns.size}")
            return problems
        indices = items.astype(np.uint64)
        other_version, altered = [indices[:0]], [indices[:0]]
        for start, chunk in chunks_of(pfns):
            part = slice(start, start + chunk.size)
            found = guest.ram.words[chunk]
            stale = found[:, _WORD_VERSION] != versions[part]
            wrong = (found != self._page_content(indices[part], versions[part])).any(axis=1)
            other_version.append(indices[part][stale])
            altered.append(indices[part][wrong & ~stale])
        for what, parts in (("pages of another version", other_version), ("pages are altered", altered)):
            which = np.concatenate(parts)
            if which.size:
                problems.append(problem_line(what, which))
        return problems
