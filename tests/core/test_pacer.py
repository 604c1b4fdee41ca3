"""The bandwidth limit in virtual time: all streams together, in bytes on the wire, and never more than is due."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from source_node import pacer
from source_node.pacer import OVERHEAD_MAX, Pacer

RATE = 2_500_000.0  # 20 Mbit/s


@pytest.fixture
def clock(monkeypatch):
    now = [10**9]
    monkeypatch.setattr(pacer, "now_ns", lambda: now[0])
    return now


def sent_over(limit, clock, sizes):
    """Sends messages one after the other, each when it may; the seconds it took until the next might go."""
    begin = clock[0]
    for size in sizes:
        clock[0] = max(clock[0], limit.reserve(size))
    clock[0] = max(clock[0], limit.reserve(0))
    return (clock[0] - begin) / 1e9


@pytest.mark.parametrize("size", [100_000, 7, 1 << 20])
def test_the_limit_is_kept(clock, size) -> None:
    count = 200
    assert sent_over(Pacer(RATE), clock, [size] * count) == pytest.approx(size * count / RATE, rel=1e-4)


@pytest.mark.usefixtures("clock")
def test_streams_share_one_limit() -> None:
    limit = Pacer(RATE)
    slots = [limit.reserve(100_000) for _ in range(8)]  # eight streams at the same moment
    gaps = {later - earlier for earlier, later in itertools.pairwise(slots)}
    assert gaps == {40_000_000}


def test_wire_bytes_count_not_message_bytes(clock) -> None:
    limit = Pacer(RATE)
    assert limit.overhead == 1.0
    limit.measured(1000, 5000)
    assert limit.overhead == 1.0, "too little was sent to know"
    limit.measured(100_000_000, 104_560_000)  # full framing of 1500-byte packets
    assert sent_over(limit, clock, [100_000] * 50) == pytest.approx(5_000_000 * 1.0456 / RATE, rel=1e-4)
    limit.measured(100_000_000, 900_000_000)
    assert limit.overhead == OVERHEAD_MAX, "a link that breaks is no reason to stand still"
    limit.measured(100_000_000, 90_000_000)
    assert limit.overhead == 1.0, "what is still in a buffer is no gain"


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 10**9)), min_size=1, max_size=30))
def test_a_pause_is_not_made_up_for(steps) -> None:
    """Over no stretch of time more goes than the limit, but for the one message that is under way."""
    now = [10**9]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pacer, "now_ns", lambda: now[0])
        limit, sent = Pacer(RATE), []
        for size, pause_ns in steps:
            now[0] = max(now[0], limit.reserve(size))
            sent.append((now[0], size))
            now[0] += pause_ns
    for index, (begin, _) in enumerate(sent):
        total = 0
        for at, size in sent[index:]:
            assert total <= (at - begin) / 1e9 * RATE + 1, "before this one nothing was ahead"
            total += size
