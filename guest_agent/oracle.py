"""What the workloads did, written down outside guest RAM.

Rule 1: a record follows the RAM write that it tells of, within the same step: whoever stops the guest between
        two steps has both.
Rule 2: kinds below VALUE_KIND_FIRST count versions: for one item they rise by exactly one, record after
        record, across all hosts. A repetition or a jump means that a guest went on from an older image, that
        two guests ran, or that records are lost.
Rule 3: kinds from VALUE_KIND_FIRST upwards carry values: the last record counts.
Rule 4: what is expected of RAM is the last record of each item, exactly: neither older nor newer.
"""

import os
import threading
from pathlib import Path
from typing import Final

import numpy as np

from guest_agent.arrays import I64Array, U32Array, U64Array
from guest_agent.errors import OracleError

ORACLE_RECORD: Final = np.dtype([("workload", "<u2"), ("kind", "<u2"), ("item", "<u4"), ("version", "<u8")])
assert ORACLE_RECORD.itemsize == 16

VALUE_KIND_FIRST: Final = 0x8000


class OracleLog:
    """An append-only file of records; safe to use from several threads."""

    def __init__(self, path: Path | str) -> None:
        """Open or make the file (mode 0600).

        Raises:
            OSError: it cannot be written.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)
        self._lock = threading.Lock()

    def append(self, workload: int, kind: int, items: U32Array, versions: U64Array) -> None:
        """Write one record per item, in the order given, before returning.

        Raises:
            OSError: the file system refused; the guest must not go on unrecorded.
        """
        records = np.empty(items.size, dtype=ORACLE_RECORD)
        records["workload"] = workload
        records["kind"] = kind
        records["item"] = items
        records["version"] = versions
        left = memoryview(records.tobytes())
        with self._lock:
            while left:
                left = left[os.write(self._fd, left) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class Expectations(dict[tuple[int, int], tuple[U32Array, U64Array]]):
    """Per (workload, kind): the items, ascending, and each one's last version or value.

    Attributes:
        inconsistent: per (workload, kind) the items whose versions did not rise by one (rule 2), ascending;
            only where there are any.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inconsistent: dict[tuple[int, int], U32Array] = {}


def expectations(data: bytes | memoryview) -> Expectations:
    """Read oracle logs: one host's, or several hosts' joined in the order in which they ran the guest.

    Raises:
        OracleError: data is no whole number of records.
    """
    size = memoryview(data).nbytes
    if size % ORACLE_RECORD.itemsize:
        raise OracleError(f"oracle log of {size} bytes ends inside a record")
    records = np.frombuffer(data, dtype=ORACLE_RECORD)
    result = Expectations()
    streams = records["workload"].astype(np.int64) << 16 | records["kind"]
    for stream in np.unique(streams).tolist():
        key = (stream >> 16, stream & 0xFFFF)
        chosen = records[streams == stream]
        order = np.argsort(chosen["item"], kind="stable")
        items, versions = chosen["item"][order], chosen["version"][order]
        last: I64Array = np.append(np.flatnonzero(np.diff(items)), items.size - 1)
        result[key] = (items[last].astype(np.uint32), versions[last].astype(np.uint64))
        if key[1] < VALUE_KIND_FIRST:
            broken = (items[1:] == items[:-1]) & (versions[1:] != versions[:-1] + np.uint64(1))
            if broken.any():
                result.inconsistent[key] = np.unique(items[1:][broken]).astype(np.uint32)
    return result
