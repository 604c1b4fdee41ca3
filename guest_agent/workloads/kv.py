"""A key-value store in guest RAM.

Rule 1: a record is 256 bytes: key, version, 29 words of value, checksum. The value follows from (seed, key,
        version), the checksum from all words before it; 16 records make a page.
Rule 2: an update raises the version by one, as read from RAM, rewrites the record, then is recorded in the
        oracle.
Rule 3: every operation reads its record first and verifies key and checksum, as a client would; what it finds
        wrong is counted in the registers and fails the check, even when an update then heals the record.
Rule 4: a key updated twice in one batch is updated once.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from guest_agent.arrays import PAGE_WORDS, I64Array, U64Array
from guest_agent.oracle import Expectations
from guest_agent.workloads.base import Guest, Pacer, Workload, problem_line, register_integer
from guest_agent.workloads.choice import PATTERNS, Chooser
from guest_agent.workloads.content import chunks_of, mix, stream_key, word_sums
from guest_agent.workloads.options import Options

KIND_RECORD_VERSION: Final = 0
RECORD_WORDS: Final = 32
RECORDS_PER_PAGE: Final = PAGE_WORDS // RECORD_WORDS
_KEY: Final = 0
_VERSION: Final = 1
_VALUE_FIRST: Final = 2
_CHECKSUM: Final = RECORD_WORDS - 1
_VALUE_WORDS: Final = _CHECKSUM - _VALUE_FIRST
_BATCH_OPERATIONS_MAX: Final = 1024  # about 1 ms of record making
_CHECK_RECORDS: Final = 4096


class KeyValueStore(Workload):
    """Options: records, operations_per_second, update_share (default one half), pattern (default zipf)."""

    kind = "kv"

    def __init__(self, name: str, workload_id: int, options: Options) -> None:
        super().__init__(name, workload_id, options)
        self._records = options.count("records")
        self._rate = options.rate("operations_per_second")
        self._update_share = options.share("update_share", 0.5)
        self._pattern = options.choice("pattern", PATTERNS, "zipf")
        self._pages = -(-self._records // RECORDS_PER_PAGE)
        self._read_errors = 0

    def set_up(self, guest: Guest) -> None:
        """Write version 1 of every record; the unused end of the last page is zero."""
        pfns = self.allocate(guest, self._pages)
        self._attach(guest, pfns, batches=0)
        versions = np.ones(self._records, dtype=np.uint64)
        for start, chunk in chunks_of(pfns):
            first = start * RECORDS_PER_PAGE
            end = min(first + chunk.size * RECORDS_PER_PAGE, self._records)
            content = np.zeros((chunk.size * RECORDS_PER_PAGE, RECORD_WORDS), dtype=np.uint64)
            content[: end - first] = self._make(np.arange(first, end, dtype=np.uint64), versions[first:end])
            guest.ram.words[chunk] = content.reshape(chunk.size, PAGE_WORDS)
        guest.oracle.append(self.id, KIND_RECORD_VERSION, np.arange(self._records, dtype=np.uint32), versions)

    def _attach(self, guest: Guest, pfns: U64Array, batches: int) -> None:
        self._guest = guest
        self._pfns: I64Array = pfns.astype(np.int64)
        self._table: U64Array = guest.ram.words.reshape(-1, RECORDS_PER_PAGE, RECORD_WORDS)
        key = stream_key(guest.seed, self.name)
        self._salt = np.uint64(key & 0xFFFF_FFFF_FFFF_FFFF)
        self._chooser = Chooser(key, self._pattern, self._records, batches)
        self._pacer = Pacer(self._rate, _BATCH_OPERATIONS_MAX)

    def step(self, now_ns: int) -> int:
        """Serve the operations that are due."""
        due = self._pacer.take(now_ns)
        if due:
            self._serve(self._chooser.draw(due))
            self.operations += due
        return self._pacer.wait_ns()

    def _serve(self, keys: I64Array) -> None:
        records = self._table[self._pfns[keys // RECORDS_PER_PAGE], keys % RECORDS_PER_PAGE]
        self._read_errors += int(np.count_nonzero(~_sound(records, keys.astype(np.uint64))))
        # The first of a batch are the updates: which keys they are is random, so nothing is lost by that.
        updated, at = np.unique(keys[: round(self._update_share * keys.size)], return_index=True)
        if not updated.size:
            return
        versions = records[at, _VERSION] + np.uint64(1)
        places = self._pfns[updated // RECORDS_PER_PAGE], updated % RECORDS_PER_PAGE
        self._table[places] = self._make(updated.astype(np.uint64), versions)
        self._guest.oracle.append(self.id, KIND_RECORD_VERSION, updated.astype(np.uint32), versions)

    def _make(self, keys: U64Array, versions: U64Array) -> U64Array:
        """Records, shape (n, 32)."""
        records = np.empty((keys.size, RECORD_WORDS), dtype=np.uint64)
        records[:, _KEY] = keys
        records[:, _VERSION] = versions
        seeds = mix(mix(keys + self._salt) + versions)
        words: U64Array = np.add.outer(seeds, np.arange(_VALUE_WORDS, dtype=np.uint64))
        records[:, _VALUE_FIRST:_CHECKSUM] = mix(words)
        records[:, _CHECKSUM] = word_sums(records[:, :_CHECKSUM])
        return records

    def registers(self) -> dict[str, Any]:
        """Operations, batches drawn and reads that found something wrong."""
        return super().registers() | {
            "batches": self._chooser.batches,
            "position": self._chooser.position,
            "read_errors": self._read_errors,
        }

    def restore(self, guest: Guest, registers: Mapping[str, Any]) -> None:
        """Find the pages again and go on with the next batch."""
        self.operations = register_integer(self.name, registers, "operations")
        self._read_errors = register_integer(self.name, registers, "read_errors")
        pfns = self.owned_pages(guest, self._pages)
        self._attach(guest, pfns, register_integer(self.name, registers, "batches"))
        self._chooser.position = register_integer(self.name, registers, "position")

    def check(self, expected: Expectations) -> list[str]:
        """Every record is exactly that of its last recorded version, and no read ever went wrong."""
        items, versions, problems = self.expected_of(expected, KIND_RECORD_VERSION)
        if self._read_errors:
            problems.append(f"{self._read_errors} reads found a broken record")
        frames = self._guest.frames
        pfns = frames.pfns_of(self.id).astype(np.int64)
        pages_wanted = np.arange(self._pages, dtype=np.uint32)
        if items.size != self._records or not np.array_equal(frames.index[pfns], pages_wanted):
            problems.append(
                f"the oracle knows {items.size} of {self._records} records, "
                f"the frame table {pfns.size} of {self._pages} pages"
            )
            return problems
        other_version, altered = [items[:0]], [items[:0]]
        for start in range(0, items.size, _CHECK_RECORDS):
            part = slice(start, start + _CHECK_RECORDS)
            keys = items[part].astype(np.int64)
            found = self._table[pfns[keys // RECORDS_PER_PAGE], keys % RECORDS_PER_PAGE]
            stale = found[:, _VERSION] != versions[part]
            wrong = (found != self._make(keys.astype(np.uint64), versions[part])).any(axis=1)
            other_version.append(items[part][stale])
            altered.append(items[part][wrong & ~stale])
        for what, parts in (("records of another version", other_version), ("records are altered", altered)):
            which = np.concatenate(parts)
            if which.size:
                problems.append(problem_line(what, which))
        return problems


def _sound(records: U64Array, keys: U64Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each record has its key and a right checksum."""
    sound: np.ndarray[tuple[int], np.dtype[np.bool_]] = (records[:, _KEY] == keys) & (
        records[:, _CHECKSUM] == word_sums(records[:, :_CHECKSUM])
    )
    return sound
