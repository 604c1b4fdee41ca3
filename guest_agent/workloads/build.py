"""A build: compilers that take memory, write it, read headers, leave an object file, and give everything back.

Rule 1: `jobs` compilers take turns. A unit of work of one of them is: fill its arena, rewrite it `passes` times,
        write one object file into the page cache, free the arena at once. The object replaces the one of the same
        number, whose pages are freed. For each page that a compiler writes it reads `reads` pages of the headers,
        which are in the page cache and never change: that stands for what a compiler computes.
Rule 2: progress is counted in pages and paced by `rate`; where a unit stands follows from one number, so the
        registers and the oracle hold one number a compiler.
Rule 3: content follows from (seed, unit, page, pass), or (seed, object, version, page). All of it is checked: the
        headers, every object, and the arenas of the units under way.
Rule 4: indices of page frames say what they are: objects first, headers from _HEADERS, arenas from _ARENAS.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from guest_agent.arrays import PAGE_BYTES, U32Array, U64Array
from guest_agent.errors import OutOfMemory, RestoreError, WorkloadError
from guest_agent.frames import FrameKind
from guest_agent.oracle import VALUE_KIND_FIRST, Expectations
from guest_agent.workloads.base import Guest, Pacer, Workload, problem_line, register_integer
from guest_agent.workloads.content import CHUNK_PAGES, PageContent, chunks_of, stream_key
from guest_agent.workloads.options import Options

KIND_OBJECT_VERSION: Final = 0  # per object: how often it was written
KIND_PROGRESS: Final = VALUE_KIND_FIRST  # per compiler: units begun before << 32 | pages of progress

JOBS_DEFAULT: Final = 4
ARENA_DEFAULT: Final = 32 << 20
OBJECT_DEFAULT: Final = 512 << 10
OBJECTS_DEFAULT: Final = 64
HEADERS_DEFAULT: Final = 64 << 20
PASSES_DEFAULT: Final = 2
READS_DEFAULT: Final = 8
RATE_DEFAULT: Final = 10_000.0
_HEADERS: Final = 1 << 30
_ARENAS: Final = 1 << 31
_PASSES_MAX: Final = 200  # a version has eight bits in a unit's stamp
_BATCH_PAGES_MAX: Final = 512  # about 2 ms, each page written and one read
_UNIT_SHIFT, _PAGE_SHIFT, _VERSION_SHIFT = np.uint64(28), np.uint64(8), np.uint64(32)
_PROGRESS_MASK: Final = (1 << 32) - 1


class Build(Workload):
    """Options: jobs, arena (bytes each), object (bytes), objects (how many), headers (bytes), passes, reads, rate.

    The rate is in pages a second. Operations are pages of progress: a unit has arena * (1 + passes) of them.
    """

    kind = "build"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        super().__init__(name, workload_id, options)
        self._jobs = options.count("jobs", JOBS_DEFAULT)
        self._arena_pages = _pages(options.size("arena", ARENA_DEFAULT))
        self._object_pages = _pages(options.size("object", OBJECT_DEFAULT))
        self._objects = options.count("objects", OBJECTS_DEFAULT)
        self._header_pages = _pages(options.size("headers", HEADERS_DEFAULT))
        self._passes = options.count("passes", PASSES_DEFAULT)
        self._reads = options.count("reads", READS_DEFAULT)
        self._rate = options.rate("rate", RATE_DEFAULT)
        if self._passes > _PASSES_MAX:
            raise WorkloadError(f"workload {name}: passes: {self._passes} is more than {_PASSES_MAX}")
        if self._jobs * self._arena_pages >= _HEADERS or self._objects * self._object_pages >= _HEADERS:
            raise WorkloadError(f"workload {name}: arenas or objects are more pages than can be numbered")
        self._unit_pages = self._arena_pages * (1 + self._passes)

    def set_up(self, guest: Guest) -> None:
        """Write the headers and every object once; the compilers start at different places of their units."""
        self._attach(guest, [_packed(job, 0) for job in range(self._jobs)], turn=0)
        try:
            self._write_everything(guest)
        except OutOfMemory as error:
            raise WorkloadError(f"workload {self.name}: {error}") from error

    def _write_everything(self, guest: Guest) -> None:
        pfns = guest.buddy.alloc_bulk(
            self._header_pages, kind=FrameKind.CACHE, owner=self.id, index_first=_HEADERS
        )
        self._header_content.fill(guest.ram, pfns)
        self._header_pfns = pfns.astype(np.int64)
        for number in range(self._objects):
            self._write_object(number, 1)
        for job in range(self._jobs):
            self._log_progress(job)
            ahead = self._unit_pages * job // self._jobs
            while ahead:
                ahead -= self._compile(job, min(ahead, _BATCH_PAGES_MAX))

    def _attach(self, guest: Guest, progress: list[int], turn: int) -> None:
        self._guest = guest
        self._progress = progress
        self._turn = turn  # whose turn it is; also how many turns there were
        self._arenas = [np.empty(self._arena_pages, np.int64) for _ in range(self._jobs)]
        self._object_pfns = np.zeros((self._objects, self._object_pages), np.uint64)
        self._versions = np.zeros(self._objects, np.uint64)
        self._header_pfns = np.empty(0, np.int64)
        key = stream_key(guest.seed, self.name)
        self._arena_content = PageContent(key)
        self._object_content = PageContent(stream_key(guest.seed, f"{self.name}/objects"))
        self._header_content: PageContent = PageContent(stream_key(guest.seed, f"{self.name}/headers"))
        self._pacer = Pacer(self._rate, _BATCH_PAGES_MAX)

    def step(self, now_ns: int) -> int:
        """One compiler's turn, for what is due."""
        due = self._pacer.take(now_ns)
        while due:
            due -= self._compile(self._turn % self._jobs, due)
            self._turn += 1
        return self._pacer.wait_ns()

    def _compile(self, job: int, pages_max: int) -> int:
        """Progress of one compiler: within one pass over its arena; how many pages."""
        unit, done = _unpacked(self._progress[job])
        at = done % self._arena_pages
        count = min(pages_max, self._arena_pages - at)
        arena, guest = self._arenas[job], self._guest
        if done < self._arena_pages:
            arena[at : at + count] = guest.buddy.alloc_bulk(
                count, kind=FrameKind.ANON, owner=self.id, index_first=_ARENAS + job * self._arena_pages + at
            )
        guest.ram.words[arena[at : at + count]] = self._arena_pages_of(
            unit, at, count, done // self._arena_pages
        )
        self._read_headers(count)
        self.operations += count
        done += count
        if done == self._unit_pages:
            self._finish_unit(job, unit)
        else:
            self._progress[job] = _packed(unit, done)
        self._log_progress(job)
        return count

    def _finish_unit(self, job: int, unit: int) -> None:
        number = unit % self._objects
        self._write_object(number, int(self._versions[number]) + 1)
        self._guest.buddy.free_bulk(self._arenas[job].astype(np.uint64))
        self._progress[job] = _packed(unit + self._jobs, 0)

    def _write_object(self, number: int, version: int) -> None:
        guest, first = self._guest, number * self._object_pages
        pfns = guest.buddy.alloc_bulk(
            self._object_pages, kind=FrameKind.CACHE, owner=self.id, index_first=first
        )
        for start, chunk in chunks_of(pfns):
            guest.ram.words[chunk] = self._object_pages_of(number, version, start, chunk.size)
        old, had_one = self._object_pfns[number].copy(), self._versions[number] > 0
        self._object_pfns[number] = pfns
        self._versions[number] = version
        guest.oracle.append(
            self.id, KIND_OBJECT_VERSION, np.array([number], np.uint32), np.array([version], np.uint64)
        )
        if had_one:
            guest.buddy.free_bulk(old)

    def _read_headers(self, count: int) -> int:
        """A compiler reads on in the headers, from where the last one stopped; a checksum, as a reader would."""
        words, checksum = self._guest.ram.words, 0
        first = self.operations * self._reads
        for at in range(
            first, first + count * self._reads, CHUNK_PAGES
        ):  # a MiB at a time, as page content is
            places = np.arange(at, min(at + CHUNK_PAGES, first + count * self._reads)) % self._header_pages
            checksum ^= int(np.bitwise_xor.reduce(words[self._header_pfns[places]], axis=None))
        return checksum

    def _arena_pages_of(self, unit: int, at: int, count: int, version: int) -> U64Array:
        pages = np.arange(at, at + count, dtype=np.uint64) << _PAGE_SHIFT
        return self._arena_content.pages((np.uint64(unit) << _UNIT_SHIFT) + pages + np.uint64(version))

    def _object_pages_of(self, number: int, version: int, start: int, count: int) -> U64Array:
        first = number * self._object_pages + start
        pages = np.arange(first, first + count, dtype=np.uint64)
        return self._object_content.pages((np.uint64(version) << _VERSION_SHIFT) + pages)

    def _log_progress(self, job: int) -> None:
        self._guest.oracle.append(
            self.id, KIND_PROGRESS, np.array([job], np.uint32), np.array([self._progress[job]], np.uint64)
        )

    def registers(self) -> dict[str, Any]:
        """Operations, turns, and where each compiler stands."""
        places = {f"progress_{job}": place for job, place in enumerate(self._progress)}
        return super().registers() | {"turn": self._turn} | places

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Find headers, objects and arenas again by the indices of their frames."""
        self.operations = register_integer(self.name, registers, "operations")
        progress = [register_integer(self.name, registers, f"progress_{job}") for job in range(self._jobs)]
        self._attach(guest, progress, register_integer(self.name, registers, "turn"))
        pfns, indices = self._frames()
        self._header_pfns = _between(pfns, indices, _HEADERS, self._header_pages).astype(np.int64)
        objects = _between(pfns, indices, 0, self._objects * self._object_pages)
        wanted = self._objects * self._object_pages, self._header_pages
        if (objects.size, self._header_pfns.size) != wanted:
            found = f"{objects.size} and {self._header_pfns.size}"
            raise RestoreError(f"workload {self.name}: {found} pages of objects and headers, not {wanted}")
        self._object_pfns = objects.reshape(self._objects, self._object_pages)
        for job in range(self._jobs):
            arena = _between(pfns, indices, _ARENAS + job * self._arena_pages, self._arena_pages)
            filled = min(_unpacked(self._progress[job])[1], self._arena_pages)
            if arena.size != filled:
                raise RestoreError(f"workload {self.name}: {arena.size} pages of an arena of {filled}")
            self._arenas[job][:filled] = arena
        self._versions = self._versions_written()  # follow from the progress

    def _versions_written(self) -> U64Array:
        """Which version of each object there must be: units end in order, compiler by compiler."""
        versions = np.ones(self._objects, np.uint64)
        for job, packed in enumerate(self._progress):
            finished = np.arange(job, _unpacked(packed)[0], self._jobs, dtype=np.int64)
            np.add.at(versions, finished % self._objects, np.uint64(1))
        return versions

    def _frames(self) -> tuple[U64Array, U32Array]:
        """This workload's pages and their indices, in the order of these."""
        pfns = self._guest.frames.pfns_of(self.id)
        return pfns, self._guest.frames.index[pfns.astype(np.int64)]

    def check(self, expected: Expectations) -> list[str]:
        """Headers, objects and arenas, by the oracle's last records."""
        objects, versions, problems = self.expected_of(expected, KIND_OBJECT_VERSION)
        jobs, progress, _ = self.expected_of(expected, KIND_PROGRESS)
        if objects.size != self._objects or jobs.size != self._jobs:
            return [*problems, f"the oracle knows {objects.size} objects and {jobs.size} compilers"]
        found = self._frames()
        headers = self._header_content.pages(_first(self._header_pages))
        problems += self._compare(found, "the headers", (_HEADERS, self._header_pages), headers)
        for number, version in enumerate(versions.tolist()):
            content = self._object_pages_of(number, version, 0, self._object_pages)
            place = number * self._object_pages, self._object_pages
            problems += self._compare(found, f"object {number}", place, content)
        for job, packed in enumerate(progress.tolist()):
            content = self._arena_now(*_unpacked(packed))
            place = _ARENAS + job * self._arena_pages, self._arena_pages
            problems += self._compare(found, f"the memory of compiler {job}", place, content)
        if found[0].size != sum(part.size for part in self._parts(found)):
            problems.append("there are pages of no header, object or compiler")
        return problems

    def _parts(self, found: tuple[U64Array, U32Array]) -> list[U64Array]:
        sizes = (
            (0, self._objects * self._object_pages),
            (_HEADERS, self._header_pages),
            (_ARENAS, self._jobs * self._arena_pages),
        )
        return [_between(*found, first, count) for first, count in sizes]

    def _arena_now(self, unit: int, done: int) -> U64Array:
        """What an arena holds after `done` pages of progress: the pass under way has come to page `at`."""
        version, at = divmod(done, self._arena_pages)
        rewritten = self._arena_pages_of(unit, 0, at, version)
        if not version:
            return rewritten
        return np.concatenate(
            (rewritten, self._arena_pages_of(unit, at, self._arena_pages - at, version - 1))
        )

    def _compare(
        self, found: tuple[U64Array, U32Array], what: str, place: tuple[int, int], content: U64Array
    ) -> list[str]:
        """`place`: the first index of what is compared, and how many there may be."""
        pfns = _between(*found, *place)
        if pfns.size != len(content):
            return [f"{what}: {pfns.size} pages instead of {len(content)}"]
        words = self._guest.ram.words
        altered = [
            start + np.flatnonzero((words[chunk] != content[start : start + chunk.size]).any(axis=1))
            for start, chunk in chunks_of(pfns)
        ]
        wrong = np.concatenate([np.empty(0, np.int64), *altered]).astype(np.uint64)
        return [problem_line(f"pages of {what} are altered", wrong)] if wrong.size else []


def _first(count: int) -> U64Array:
    return np.arange(count, dtype=np.uint64)


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES)


def _packed(unit: int, done: int) -> int:
    return unit << 32 | done


def _unpacked(progress: int) -> tuple[int, int]:
    return progress >> 32, progress & _PROGRESS_MASK


def _between(pfns: U64Array, indices: U32Array, first: int, count: int) -> U64Array:
    """Of pages sorted by index, those whose index is in [first, first + count)."""
    low, high = np.searchsorted(indices, [first, first + count])
    return pfns[low:high]
