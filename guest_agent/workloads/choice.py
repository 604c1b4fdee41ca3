"""Which items a batch of operations touches.

Rule 1: a batch's draw depends on (key, number of the batch) only; the registers are that number and, for the
        sequential pattern, the position.
Rule 2: Zipf ranks are spread over the items by a seeded permutation: hot items are not neighbours.
"""

from typing import Final

import numpy as np

from guest_agent.arrays import I64Array
from guest_agent.workloads.content import generator_at

PATTERNS: Final = ("random", "sequential", "zipf")
_ZIPF_EXPONENT: Final = 0.99  # YCSB's default
_PERMUTATION_DRAW: Final = 1 << 63  # a draw that no batch reaches


class Chooser:
    """Draws items 0..count-1. Attributes: batches drawn so far; position of the sequential pattern."""

    def __init__(self, key: int, pattern: str, count: int, batches: int) -> None:
        assert pattern in PATTERNS, pattern
        self._key = key
        self._pattern = pattern
        self._count = count
        self.batches = batches
        self.position = 0
        if pattern == "zipf":
            weights = np.arange(1, count + 1, dtype=np.float64) ** -_ZIPF_EXPONENT
            self._cumulative = np.cumsum(weights) / weights.sum()
            self._item_of_rank: I64Array = generator_at(key, _PERMUTATION_DRAW).permutation(count)

    def draw(self, operations: int) -> I64Array:
        """Items of the next batch, shape (operations,), repetitions included."""
        self.batches += 1
        if self._pattern == "sequential":
            items = (self.position + np.arange(operations, dtype=np.int64)) % self._count
            self.position = (self.position + operations) % self._count
            return items
        generator = generator_at(self._key, self.batches)
        if self._pattern == "random":
            return generator.integers(0, self._count, size=operations, dtype=np.int64)
        ranks = np.searchsorted(self._cumulative, generator.random(operations), side="right")
        return self._item_of_rank[np.minimum(ranks, self._count - 1)]
