"""Packs the pages of one stream's chunks: deltas where the destination has an older version, then compression.

Rule 1: what does not pay goes as it is: a page whose delta is no small part of it, a chunk that does not shrink.
Rule 2: what is packed is the private copy that was hashed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from host.clock import thread_cpu_ns
from migration import delta
from migration.codec import UNPACKED, Packing
from migration.compression import ENCODINGS, Compressor
from migration.packing import pack
from source_node.delta_cache import DeltaCache, no_slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migration.delta import Deltas
    from migration.pages import U8Array, U64Array

NO_WORDS: U64Array = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True)
class PackingOrder:
    """What was asked for."""

    compression: str = "none"  # none | lz4 | zstd
    delta_cache_bytes: int = 0  # over all streams; 0: no deltas


@dataclass(slots=True)
class DeltaCounts:
    """What deltas did, in pages; a page with an entry is a hit, whether its delta paid or not."""

    pages: int = 0
    bytes_saved: int = 0  # against the pages themselves, before compression
    cache_hits: int = 0
    misses: int = 0
    evicted: int = 0


class Packer:
    """One stream's. Used by one thread at a time."""

    def __init__(self, compression: str, cache: DeltaCache | None) -> None:
        self.deltas = DeltaCounts()
        self.saved_bytes = 0  # of the pages' own, by both together
        self.cpu_ns = 0  # of compressing and of finding differences
        self.compressor = Compressor(compression) if compression != "none" else None
        self._encoding = ENCODINGS[compression]
        self._cache = cache

    def pack(self, round_index: int, pfns: U64Array, pages: U8Array) -> tuple[Packing, U8Array | bytes]:
        """The data of these pages (pages, 4096), and what the message says of it."""
        started_ns = thread_cpu_ns()
        raw, deltas, words = pages, None, NO_WORDS
        if self._cache is not None:
            raw, deltas, words = self._differences(self._cache, round_index, pfns, pages)
        if deltas is None and self.compressor is None:
            packed: tuple[Packing, U8Array | bytes] = UNPACKED, pages.reshape(-1)
        else:
            packed = pack(raw, self._encoding, self.compressor, deltas, words)
        self.saved_bytes += pages.nbytes - len(packed[1]) - len(packed[0].delta)
        self.cpu_ns += thread_cpu_ns() - started_ns
        return packed

    def forget(self, pfns: U64Array) -> None:
        """What the destination has of these pages is not known (any more), or is zero."""
        if self._cache is not None:
            self._cache.forget(pfns)

    def _differences(
        self, cache: DeltaCache, round_index: int, pfns: U64Array, pages: U8Array
    ) -> tuple[U8Array, Deltas | None, U64Array]:
        """The pages that go as they are, and the deltas of the others with their words."""
        cache.begin(round_index)
        new = pages.view(np.uint64)
        places = np.flatnonzero(cache.known(pfns))
        deltas, words = None, NO_WORDS
        self.deltas.cache_hits += places.size
        if round_index > 1:
            self.deltas.misses += len(pfns) - places.size
        if places.size:
            deltas, words, saved = delta.encode(places, new[places], cache.versions(pfns[places]))
            self.deltas.pages += deltas.places.size
            self.deltas.bytes_saved += saved
        cache.keep(pfns, new)
        self.deltas.evicted = cache.evicted
        if deltas is None or not deltas.places.size:
            return pages, None, NO_WORDS
        is_raw = np.ones(len(pfns), np.bool_)
        is_raw[deltas.places] = False
        return pages[is_raw], deltas, words


def packers(order: PackingOrder, streams: int, pages: int) -> list[Packer | None]:
    """One for each stream of an attempt whose guest has so many pages; none where nothing is to be packed."""
    if order.compression == "none" and not order.delta_cache_bytes:
        return [None] * streams
    slots = no_slots(pages) if order.delta_cache_bytes else None
    return [
        Packer(
            order.compression,
            DeltaCache(slots, order.delta_cache_bytes // streams) if slots is not None else None,
        )
        for _ in range(streams)
    ]


def report(order: PackingOrder, of: Sequence[Packer | None]) -> dict[str, object]:
    """`compression` and `delta` of the result document, as far as the source knows them."""
    used = [packer for packer in of if packer is not None]
    compressors = [packer.compressor for packer in used if packer.compressor is not None]
    deltas = [asdict(packer.deltas) for packer in used] or [asdict(DeltaCounts())]
    return {
        "compression": {
            "kind": order.compression,
            **{
                name: sum(getattr(one, name) for one in compressors)
                for name in ("chunks", "given_up_chunks", "bytes_in", "bytes_out")
            },
            "cpu_seconds_source": sum(packer.cpu_ns for packer in used) / 1e9,
        },
        "delta": {name: sum(one[name] for one in deltas) for name in deltas[0]},
    }
