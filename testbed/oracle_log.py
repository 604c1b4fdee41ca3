"""What the guest must remember, as its workloads logged it outside guest memory.

Rule 1: records of both hosts are one log: first what the guest did at the source, then at the destination.
Rule 2: of each item only the last version counts; that is what the guest is asked for.
Rule 3: a torn last record (its writer was killed) is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RECORD = np.dtype([("workload", "<u2"), ("kind", "<u2"), ("item", "<u4"), ("version", "<u8")])
assert RECORD.itemsize == 16


def expectations(logs: Iterable[Path]) -> bytes:
    """The last record of every (workload, kind, item) of the logs, in their order; missing logs are empty."""
    data = b"".join(_whole_records(path) for path in logs)
    records = np.frombuffer(data, dtype=RECORD)
    # The first 8 bytes of a record name its item: one integer to compare instead of three.
    keys = np.ascontiguousarray(records).view("<u8")[::2]
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    return records[np.sort(len(records) - 1 - from_the_end)].tobytes()


def _whole_records(path: Path) -> bytes:
    data = path.read_bytes() if path.exists() else b""
    return data[: len(data) // RECORD.itemsize * RECORD.itemsize]
