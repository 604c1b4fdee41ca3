"""Seeded content of pages and records: quick to make, incompressible, checkable from the seed alone.

Rule 1: content is a function of (key, index) or (key, index, version); no state is carried from page to page.
Rule 2: randomness is counter-based: a stream's register is the number of draws, nothing else.
Rule 3: one changed bit changes a sum: each word counts with its own odd factor (multilinear, modulo 2^64).
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np

from guest_agent.arrays import PAGE_WORDS, I64Array, U64Array
from guest_agent.ram import GuestRam

CHUNK_PAGES: Final = 256  # 1 MiB at a time stays in the cache
_POOL_PAGES: Final = 256
_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, name: str) -> int:
    """The 128-bit key of one component's randomness: adding a component never shifts another's dice."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


def generator_at(key: int, draw: int) -> np.random.Generator:
    """The generator of the stream's draw number `draw`; each draw has 2^128 values to itself."""
    return np.random.Generator(np.random.Philox(key=key, counter=draw << 128))


def mix(values: U64Array) -> U64Array:
    """Spread values over 64 bits, each on its own (the finaliser of splitmix64)."""
    mixed = (values + np.uint64(1)) * _GOLDEN
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


_FACTORS: Final[U64Array] = mix(np.arange(PAGE_WORDS, dtype=np.uint64)) | np.uint64(1)


def word_sums(words: U64Array) -> U64Array:
    """One checksum per row; words has shape (n, k), k <= 512; the result (n,) and never 0."""
    sums = mix(words @ _FACTORS[: words.shape[1]])
    sums[sums == 0] = 1
    return sums


class PageContent:
    """Page content of one key: page i is a pool page chosen by i, xored with a word made of i."""

    def __init__(self, key: int) -> None:
        self._key = key
        self._salt = np.uint64(key & _MASK)

    @cached_property
    def _pool(self) -> U64Array:
        """Any 256 neighbours without wrapping. Made when it is first needed: a restored guest is waited for."""
        pool = generator_at(self._key, 0).integers(
            0, _MASK, size=(_POOL_PAGES, PAGE_WORDS), dtype=np.uint64, endpoint=True
        )
        doubled: U64Array = np.concatenate((pool, pool))
        return doubled

    def pages(self, indices: U64Array) -> U64Array:
        """Content of pages in any order: uint64, shape (n, 512)."""
        content: U64Array = self._pool[indices & np.uint64(_POOL_PAGES - 1)]
        content ^= mix(indices + self._salt)[:, None]
        return content

    def fill(self, ram: GuestRam, pfns: U64Array, index_first: int = 0) -> None:
        """Write whole pages: pfns[k] gets the content of index_first + k."""
        for start, chunk in chunks_of(pfns):
            first = index_first + start
            indices = np.arange(first, first + chunk.size, dtype=np.uint64)
            pfn = int(chunk[0])
            if int(chunk[-1]) - pfn == chunk.size - 1 and (np.diff(chunk) == 1).all():
                at = first % _POOL_PAGES
                rows = self._pool[at : at + chunk.size]
                out = ram.words[pfn : pfn + chunk.size]
                np.bitwise_xor(rows, mix(indices + self._salt)[:, None], out=out)
            else:
                ram.words[chunk] = self.pages(indices)


def chunks_of(pfns: U64Array, pages: int = CHUNK_PAGES) -> Iterator[tuple[int, I64Array]]:
    """Cut page numbers into pieces of at most `pages`: (offset of the first, the piece as int64)."""
    signed = pfns.astype(np.int64)
    for start in range(0, signed.size, pages):
        yield start, signed[start : start + pages]
