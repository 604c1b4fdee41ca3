"""The destination's alarm: it rings under its owner's lock, once, and only if nothing was said since."""

import threading

import pytest

from dest_node.alarm import Alarm

WAIT_S = 20
LATER_S = 3_600.0


@pytest.fixture(name="owner")
def fixture_owner():
    """A lock, what was locked whenever the alarm rang, and the alarm."""
    lock, rang = threading.Lock(), []
    alarm = Alarm(lock, lambda: rang.append(lock.locked()))
    yield lock, rang, alarm
    alarm.cancel()


def set_to_ring(alarm):
    """Due at once, and past the point at which a timer can be stopped: its thread waits for the lock."""
    reached = threading.Event()
    ring = alarm._ring
    alarm._ring = lambda timer: (reached.set(), ring(timer))
    alarm.set(0.0)
    assert reached.wait(WAIT_S)
    return alarm._timer


def test_it_rings_under_the_lock(owner):
    lock, rang, alarm = owner
    with lock:
        due = set_to_ring(alarm)
    due.join(WAIT_S)
    assert rang == [True]


@pytest.mark.parametrize(
    "silence", [lambda alarm: alarm.set(LATER_S), Alarm.cancel], ids=["anew", "cancelled"]
)
def test_one_that_waits_for_the_lock_is_silenced_all_the_same(owner, silence):
    lock, rang, alarm = owner
    with lock:
        due = set_to_ring(alarm)
        silence(alarm)
    due.join(WAIT_S)
    assert not due.is_alive()
    assert rang == []
