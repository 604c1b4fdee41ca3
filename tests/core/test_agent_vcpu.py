"""The vCPU and the beats: fair steps, a clock that can stand still, records that match RAM."""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guest_agent.beats import BEAT_RECORD, Beats
from guest_agent.clock import GuestClock, host_now_ns
from guest_agent.errors import GateShut
from guest_agent.gate import PauseGate
from guest_agent.threads import GuestThread
from guest_agent.vcpu import IDLE_NS_MAX, Vcpu


@dataclass
class Counting:
    """A workload that counts its steps and asks to run again after `wait_ns`."""

    name: str
    wait_ns: int = 0
    on_step: Callable[[int], None] = lambda _: None
    steps: int = 0
    times: list[int] = field(default_factory=list)

    def step(self, now_ns: int) -> int:
        self.steps += 1
        self.times.append(now_ns)
        self.on_step(self.steps)
        return self.wait_ns


def run_until(workloads: list[Any], done: threading.Event) -> None:
    gate, stopping, clock = PauseGate(), threading.Event(), GuestClock(5)
    vcpu = Vcpu(workloads, clock, gate, stopping)
    failures: list[tuple[str, BaseException]] = []
    thread = GuestThread("vcpu", vcpu.run, lambda name, error: failures.append((name, error)))
    thread.start()
    clock.start()
    gate.open()
    assert done.wait(10)
    stopping.set()
    gate.shut()
    thread.join(5)
    assert not thread.is_alive()
    assert failures == []


def test_no_workload_starves_another() -> None:
    done = threading.Event()
    busy, other = Counting("busy"), Counting("other")
    other.on_step = lambda steps: done.set() if steps >= 50 else None
    run_until([busy, other], done)
    assert abs(busy.steps - other.steps) <= 1


def test_guest_time_reaches_the_workloads_and_never_goes_back() -> None:
    done = threading.Event()
    timed = Counting("timed", wait_ns=100_000, on_step=lambda steps: done.set() if steps >= 10 else None)
    run_until([timed], done)
    assert timed.times[0] >= 5
    assert all(after - before >= 100_000 for before, after in zip(timed.times, timed.times[1:], strict=False))


class Looks(threading.Event):
    """How long the vCPU would sleep each time it finds nothing to do; it is stopped at the third."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps_s: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.sleeps_s.append(timeout)
        if len(self.sleeps_s) == 3:
            self.set()
        return self.is_set()


def test_a_guest_without_work_sleeps_between_two_looks() -> None:
    gate, stopping = PauseGate(), Looks()
    gate.open()
    Vcpu([], GuestClock(5), gate, stopping).run()
    assert stopping.sleeps_s == [IDLE_NS_MAX / 1e9] * 3


def test_guest_clock_stands_still_while_stopped() -> None:
    clock = GuestClock(1000)
    assert clock.now_ns() == 1000
    clock.start()
    clock.start()
    clock.stop()
    stopped = clock.now_ns()
    assert stopped >= 1000
    assert clock.now_ns() == stopped
    clock.start()
    assert clock.now_ns() >= stopped


def test_what_a_guest_thread_raises_is_reported_not_swallowed() -> None:
    failures: list[tuple[str, BaseException]] = []

    def broken() -> None:
        raise ValueError("bad page")

    thread = GuestThread("vcpu", broken, lambda name, error: failures.append((name, error)))
    thread.start()
    thread.join(5)
    assert failures[0][0] == "vcpu"
    assert str(failures[0][1]) == "bad page"


def test_the_gate_being_shut_is_no_failure() -> None:
    failures: list[tuple[str, BaseException]] = []

    def body() -> None:
        raise GateShut

    thread = GuestThread("beats", body, lambda name, error: failures.append((name, error)))
    thread.start()
    thread.join(5)
    assert failures == []


class FakeBoot:
    """The two counters of a boot page."""

    beats = 41
    guest_epoch = 2


def test_beats_go_to_ram_first_and_to_the_file_one_by_one(tmp_path: Path) -> None:
    boot: Any = FakeBoot()
    beats = Beats(tmp_path / "beats", boot, PauseGate(), threading.Event())
    before = host_now_ns()
    beats.beat()
    beats.beat()
    beats.close()
    data = (tmp_path / "beats").read_bytes()
    records = list(BEAT_RECORD.iter_unpack(data))
    assert [record[1:] for record in records] == [(2, 42), (2, 43)]
    assert before <= records[0][0] <= records[1][0] <= host_now_ns()
    assert boot.beats == 43
    assert (tmp_path / "beats").stat().st_mode & 0o777 == 0o600


def test_beats_append_to_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "beats").write_bytes(struct.pack("<QQQ", 1, 1, 41))
    boot: Any = FakeBoot()
    beats = Beats(tmp_path / "beats", boot, PauseGate(), threading.Event())
    beats.beat()
    beats.close()
    assert [record[2] for record in BEAT_RECORD.iter_unpack((tmp_path / "beats").read_bytes())] == [41, 42]


@pytest.mark.parametrize("percent", [-1, 100])
def test_a_vcpu_is_slowed_never_stopped_by_throttling(percent: int) -> None:
    vcpu = Vcpu([], GuestClock(), PauseGate(), threading.Event())
    with pytest.raises(AssertionError):
        vcpu.throttle_percent = percent


class VirtualClock:
    """Guest time that passes only while the vCPU works or waits."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        """As GuestClock."""
        return self.ns


class VirtualStop(threading.Event):
    """Waiting takes no time, and lets the clock go on."""

    def __init__(self, clock: VirtualClock, end_ns: int) -> None:
        super().__init__()
        self._clock = clock
        self._end_ns = end_ns

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self._clock.ns += round(timeout * 1e9)
        if self._clock.ns >= self._end_ns:
            self.set()
        return self.is_set()


@pytest.mark.parametrize("percent", [0, 20, 50, 90, 99])
@pytest.mark.parametrize("work_ns", [10_000, 2_000_000], ids=["light", "heavy"])
def test_a_rate_falls_by_the_share_that_the_throttle_takes(percent: int, work_ns: int) -> None:
    seconds = 20
    clock = VirtualClock()
    stop = VirtualStop(clock, seconds * 1_000_000_000)
    paced = Counting("paced", wait_ns=3_000_000)

    def work(_steps: int) -> None:
        clock.ns += work_ns

    paced.on_step = work
    gate = PauseGate()
    gate.open()
    anyclock: Any = clock
    vcpu = Vcpu([paced], anyclock, gate, stop)  # type: ignore[list-item]
    vcpu.throttle_percent = percent
    vcpu.run()
    expected = seconds * 1e9 / 3_000_000 * (100 - percent) / 100
    assert paced.steps == pytest.approx(expected, rel=0.15)
    # The guest's own time goes on as if nothing had been taken: it makes nothing up afterwards.
    assert paced.times[-1] == pytest.approx(clock.ns * (100 - percent) / 100, rel=0.15)
