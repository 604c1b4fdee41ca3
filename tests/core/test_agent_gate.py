"""The pause gate: nobody is inside once `pause` returned, and a pause that fails changes nothing."""

import threading
from functools import partial

import pytest

from guest_agent.errors import GateShut, PauseTimeout
from guest_agent.gate import PauseGate
from guest_agent.threads import GuestThread


def test_gate_starts_closed_and_lets_threads_in_when_opened() -> None:
    gate, entered = PauseGate(), threading.Event()

    def body() -> None:
        with gate:
            entered.set()

    thread = threading.Thread(target=body)
    thread.start()
    assert not entered.is_set()
    gate.open()
    assert entered.wait(5)
    thread.join(5)


def test_pause_waits_for_the_slice_that_is_running() -> None:
    gate, inside, leave = PauseGate(), threading.Event(), threading.Event()
    order: list[str] = []

    def body() -> None:
        with gate:
            inside.set()
            assert leave.wait(5)
            order.append("left")

    def pauser() -> None:
        gate.pause(5)
        order.append("paused")

    gate.open()
    threads = [threading.Thread(target=body), threading.Thread(target=pauser)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["left", "paused"]
    assert not gate.is_open


def test_a_pause_that_cannot_be_had_leaves_the_gate_open() -> None:
    gate = PauseGate()
    gate.open()
    with gate:
        with pytest.raises(PauseTimeout, match="1 guest thread"):
            gate.pause(0.01)
        assert gate.is_open
    with gate:
        pass


def test_nothing_changes_while_paused_under_many_threads() -> None:
    gate, stop = PauseGate(), threading.Event()
    counter = [0] * 4

    def body(slot: int) -> None:
        while not stop.is_set():
            with gate:
                counter[slot] += 1

    gate.open()
    failures: list[tuple[str, BaseException]] = []
    threads = [
        GuestThread(f"guest{slot}", partial(body, slot), lambda name, error: failures.append((name, error)))
        for slot in range(4)
    ]
    for thread in threads:
        thread.start()
    for _ in range(20):
        gate.pause()
        before = list(counter)
        assert not stop.wait(0.001)
        assert counter == before
        gate.open()
    stop.set()
    gate.shut()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert failures == []


def test_shut_ends_waiting_threads_and_cannot_be_opened_again() -> None:
    gate, ended = PauseGate(), threading.Event()

    def body() -> None:
        try:
            with gate:
                raise AssertionError("entered a closed gate")
        except GateShut:
            ended.set()

    thread = threading.Thread(target=body)
    thread.start()
    gate.shut()
    gate.open()
    assert ended.wait(5)
    thread.join(5)
    assert not gate.is_open
