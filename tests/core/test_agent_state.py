"""The vCPU state: canonical, small, and every malformed one is a RestoreError."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_agent.errors import RestoreError
from guest_agent.state import STATE_BYTES_MAX, VcpuState, WorkloadState, digest_hex


def a_state(**changes: Any) -> VcpuState:
    fields: dict[str, Any] = {
        "guest_epoch": 3,
        "pages": 262_144,
        "seed": 7,
        "clock_ns": 123_456_789,
        "driver": {"actual": 5},
        "rings": ({"a": 1}, {}, {}, {}, {}),
        "ring_bases": (1, 2, 0, 65535, 0),
        "workloads": (WorkloadState({"name": "kv", "records": 10}, {"counter": 9}),),
    }
    return VcpuState(**(fields | changes))


def test_round_trip_is_exact_and_canonical() -> None:
    state = a_state().to_bytes()
    again = VcpuState.from_bytes(state)
    assert again == a_state()
    assert again.to_bytes() == state
    assert digest_hex(state) == digest_hex(again.to_bytes())
    assert len(digest_hex(state)) == 16


def test_a_state_that_grew_a_page_list_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="grew"):
        a_state(driver={"pfns": list(range(STATE_BYTES_MAX))}).to_bytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "version"),
        ({"guest_epoch": -1}, "guest_epoch"),
        ({"guest_epoch": "3"}, "guest_epoch"),
        ({"seed": True}, "seed"),
        ({"ring_bases": [1, 2, 3]}, "ring_bases"),
        ({"ring_bases": [1, 2, 3, 4, 65536]}, "ring_bases"),
        ({"rings": [1, 2, 3, 4, 5]}, "rings"),
        ({"driver": []}, "driver"),
        ({"workloads": [{"spec": {}}]}, "registers"),
        ({"workloads": [[]]}, "workloads"),
        ({"workloads": [{}] * 65}, "workloads"),
    ],
)
def test_malformed_states_are_refused_by_name(change: dict[str, Any], why: str) -> None:
    document = json.loads(a_state().to_bytes()) | change
    with pytest.raises(RestoreError, match=why):
        VcpuState.from_bytes(json.dumps(document).encode())


def test_a_missing_field_is_refused() -> None:
    document = json.loads(a_state().to_bytes())
    for key in document:
        with pytest.raises(RestoreError):
            VcpuState.from_bytes(json.dumps({k: v for k, v in document.items() if k != key}).encode())


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(garbage: bytes) -> None:
    with pytest.raises(RestoreError):
        VcpuState.from_bytes(garbage)


def test_too_long_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RestoreError, match="at most"):
        VcpuState.from_bytes(b"[" * (STATE_BYTES_MAX + 1))
