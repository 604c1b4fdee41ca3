"""What the guest must remember, as its workloads logged it outside guest memory.

Rule 1: records of both hosts are one log: first what the guest did at the source, then at the destination.
Rule 2: of each item only the last version is asked for; the order of versions is judged from the whole log.
Rule 3: a torn last record (its writer was killed) is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from guest_agent.oracle import ORACLE_RECORD

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

RECORD_BYTES = ORACLE_RECORD.itemsize


def read_logs(paths: Iterable[Path]) -> bytes:
    """The whole records of the logs, joined in their order; a missing log is empty."""
    return b"".join(read_log(path) for path in paths)


def last_versions(log: bytes) -> bytes:
    """The last record of every (workload, kind, item), in the order of the log."""
    records = np.frombuffer(log, dtype=ORACLE_RECORD)
    # The first 8 bytes of a record name its item: one integer to compare instead of three.
    keys = records.view("<u8")[::2]
    _, from_the_end = np.unique(keys[::-1], return_index=True)
    return records[np.sort(len(records) - 1 - from_the_end)].tobytes()


def read_log(path: Path) -> bytes:
    """The whole records of one log; a missing log is empty."""
    data = path.read_bytes() if path.exists() else b""
    return data[: len(data) // RECORD_BYTES * RECORD_BYTES]
