"""Memory that was used and given back: free, and not zero.

Rule 1: `fraction` of guest memory is filled with incompressible content; the first `keep` of guest memory in
        allocation order stays, the rest is freed. Freed content stays where it is until somebody overwrites
        it.
Rule 2: what is kept never changes; its content follows from the seed, how much it is from the oracle.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from guest_agent.errors import WorkloadError
from guest_agent.oracle import VALUE_KIND_FIRST, Expectations
from guest_agent.workloads.base import IDLE_NS, Guest, Workload, problem_line, register_integer
from guest_agent.workloads.content import PageContent, chunks_of, stream_key
from guest_agent.workloads.options import Options

KIND_KEPT_PAGES: Final = VALUE_KIND_FIRST  # item 0: how many pages are kept


class Freed(Workload):
    """Options: fraction and keep, shares of guest memory, keep at most fraction."""

    kind = "freed"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        super().__init__(name, workload_id, options)
        self._fraction = options.share("fraction")
        self._keep = options.share("keep", 0.0)
        if self._keep > self._fraction:
            raise WorkloadError(f"workload {name}: keep {self._keep} is more than fraction {self._fraction}")

    def set_up(self, guest: Guest) -> None:
        """Fill, then free all but the first pages."""
        pages = round(self._fraction * guest.ram.pages)
        self._kept = round(self._keep * guest.ram.pages)
        self._attach(guest)
        pfns = self.allocate(guest, pages)
        self._content.fill(guest.ram, pfns)
        guest.buddy.free_bulk(pfns[self._kept :])
        guest.oracle.append(
            self.id, KIND_KEPT_PAGES, np.zeros(1, dtype=np.uint32), np.array([self._kept], dtype=np.uint64)
        )
        self.operations = pages

    def _attach(self, guest: Guest) -> None:
        self._guest = guest
        self._content = PageContent(stream_key(guest.seed, self.name))

    def step(self, now_ns: int) -> int:
        """Do nothing: the pages only have to stay."""
        del now_ns
        return IDLE_NS

    def registers(self) -> dict[str, Any]:
        """Operations and the number of kept pages."""
        return super().registers() | {"kept_pages": self._kept}

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Find the kept pages again."""
        self.operations = register_integer(self.name, registers, "operations")
        self._kept = register_integer(self.name, registers, "kept_pages")
        self._attach(guest)
        self.owned_pages(guest, self._kept)

    def check(self, expected: Expectations) -> list[str]:
        """Every kept page is there and has the content of the seed."""
        _, values, problems = self.expected_of(expected, KIND_KEPT_PAGES)
        kept = int(values[0]) if values.size else 0
        pfns = self._guest.frames.pfns_of(self.id)
        indices = self._guest.frames.index[pfns.astype(np.int64)].astype(np.uint64)
        if not np.array_equal(indices, np.arange(kept, dtype=np.uint64)):
            problems.append(f"the oracle expects {kept} pages, the frame table has {pfns.size}")
        wrong = [
            indices[start : start + chunk.size][
                (
                    self._guest.ram.words[chunk] != self._content.pages(indices[start : start + chunk.size])
                ).any(axis=1)
            ]
            for start, chunk in chunks_of(pfns)
        ]
        altered = np.concatenate([np.empty(0, dtype=np.uint64), *wrong])
        if altered.size:
            problems.append(problem_line("kept pages are altered", altered))
        return problems
