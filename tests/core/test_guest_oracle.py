"""The oracle log: the last record is what is expected, and a guest that went back in time is convicted."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from guest_agent.errors import OracleError
from guest_agent.oracle import ORACLE_RECORD, VALUE_KIND_FIRST, OracleLog, expectations


@pytest.fixture
def log(tmp_path: Path) -> Iterator[OracleLog]:
    log = OracleLog(tmp_path / "oracle")
    yield log
    log.close()


def record(log: OracleLog, workload: int, kind: int, versions: dict[int, int]) -> None:
    items = np.array(list(versions), dtype=np.uint32)
    log.append(workload, kind, items, np.array(list(versions.values()), dtype=np.uint64))


def read(tmp_path: Path) -> bytes:
    return (tmp_path / "oracle").read_bytes()


def raw(records: list[tuple[int, int, int, int]]) -> bytes:
    return np.array(records, dtype=ORACLE_RECORD).tobytes()


def test_a_record_is_16_bytes_little_endian(log: OracleLog, tmp_path: Path) -> None:
    record(log, 0x0102, 3, {4: 5})
    assert read(tmp_path) == bytes.fromhex("0201 0300 04000000 0500000000000000")
    assert (tmp_path / "oracle").stat().st_mode & 0o777 == 0o600


def test_the_last_version_of_each_item_is_expected(log: OracleLog, tmp_path: Path) -> None:
    record(log, 1, 0, {7: 1, 3: 1})
    record(log, 1, 0, {7: 2})
    record(log, 2, 0, {7: 9})
    record(log, 1, 0, {7: 3})
    expected = expectations(read(tmp_path))
    items, versions = expected[1, 0]
    assert (items.tolist(), versions.tolist()) == ([3, 7], [1, 3])
    assert expected[2, 0][1].tolist() == [9]
    assert (items.dtype, versions.dtype) == (np.uint32, np.uint64)
    assert expected.inconsistent == {}


def test_an_empty_log_expects_nothing() -> None:
    assert expectations(b"") == {}


@pytest.mark.parametrize("size", [1, 15, 17])
def test_a_torn_log_is_refused(size: int) -> None:
    with pytest.raises(OracleError, match=f"{size} bytes"):
        expectations(bytes(size))


@pytest.mark.parametrize("second", [5, 4, 2, 7])
def test_a_version_that_does_not_rise_by_one_is_reported(second: int) -> None:
    expected = expectations(raw([(1, 0, 8, 5), (1, 0, 9, 1), (1, 0, 8, second), (1, 0, 9, 2)]))
    assert expected.inconsistent[1, 0].tolist() == [8]


def test_a_rollback_stays_visible_after_later_writes_covered_it() -> None:
    source = [(1, 0, 8, version) for version in (1, 2, 3, 4, 5)]
    dest = [(1, 0, 8, version) for version in (4, 5, 6, 7)]  # went on from an image that still had version 3
    expected = expectations(raw(source + dest))
    assert expected[1, 0][1].tolist() == [7]
    assert expected.inconsistent[1, 0].tolist() == [8]


def test_values_may_change_in_any_way() -> None:
    expected = expectations(raw([(1, VALUE_KIND_FIRST, 8, 500), (1, VALUE_KIND_FIRST, 8, 0)]))
    assert expected[1, VALUE_KIND_FIRST][1].tolist() == [0]
    assert expected.inconsistent == {}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from([0, 1, 0x8000]), st.integers(0, 5), st.integers(0, 2**64 - 1)
        )
    )
)
def test_expectations_equal_a_plain_reading_of_the_log(records: list[tuple[int, int, int, int]]) -> None:
    plain: dict[tuple[int, int], dict[int, int]] = {}
    inconsistent: dict[tuple[int, int], set[int]] = {}
    for workload, kind, item, version in records:
        last = plain.setdefault((workload, kind), {})
        if kind < VALUE_KIND_FIRST and item in last and version != (last[item] + 1) % 2**64:
            inconsistent.setdefault((workload, kind), set()).add(item)
        last[item] = version
    expected = expectations(raw(records))
    found = {
        key: dict(zip(items.tolist(), versions.tolist(), strict=True))
        for key, (items, versions) in expected.items()
    }
    assert found == plain
    assert {key: set(items.tolist()) for key, items in expected.inconsistent.items()} == inconsistent
