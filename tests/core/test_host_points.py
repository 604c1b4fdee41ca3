"""Points: free when nothing is armed; armed, they hold whoever comes, once, and every hold ends."""

import threading

import pytest

from dest_node import reached as dest_reached
from host.event_log import EventLog
from host.points import DEST_POINTS, SOURCE_POINTS, Points, round_point, side_of
from migration import commands as do
from migration.events import Recorded
from source_node import reached as source_reached

WAIT_S = 10.0


class Held:
    """A thread that goes past a point."""

    def __init__(self, events, go):
        self.facts = events.watch()
        self.thread = threading.Thread(target=go, daemon=True)
        self.thread.start()

    def next(self):
        fact = next(self.facts)
        return fact.name, fact.fields_json

    def ended(self):
        self.thread.join(WAIT_S)
        return not self.thread.is_alive()


@pytest.fixture
def events():
    return EventLog("test")


@pytest.fixture
def points(events):
    return Points(events)


def test_nothing_is_held_and_nothing_is_told_unless_it_was_armed(points, events):
    points.reach("stop_copy")
    points.reach_round(2, 50.0)
    points.arm("saved")
    points.reach("stop_copy")
    events.close()
    assert list(events.watch()) == []


def test_an_armed_point_holds_until_it_is_released_and_only_once(points, events):
    points.arm("stop_copy", 60_000)
    held = Held(events, lambda: points.reach("stop_copy"))
    assert held.next() == ("point_reached", '{"point":"stop_copy"}')
    assert points.release("stop_copy")
    assert held.next() == ("point_released", '{"point":"stop_copy","why":"released"}')
    assert held.ended()
    points.reach("stop_copy")
    assert not points.release("stop_copy")


def test_a_hold_ends_by_itself_and_says_so(points, events):
    points.arm("saved", 1)
    points.reach("saved")
    events.close()
    assert [fact.name for fact in events.watch()] == ["point_reached", "point_released"]
    assert "nobody came within 1 ms" in list(events.watch())[1].fields_json


def test_a_node_that_ends_holds_nobody(points, events):
    points.arm("saved")
    held = Held(events, lambda: points.reach("saved"))
    held.next()
    points.close()
    assert held.next() == ("point_released", '{"point":"saved","why":"the node ends"}')
    points.arm("saved")
    points.reach("saved")
    assert held.ended()


def test_a_released_point_is_disarmed_before_anybody_came(points):
    points.arm("saved")
    assert not points.release("saved")
    points.reach("saved")


@pytest.mark.parametrize(
    ("armed", "passed", "holds"),
    [
        ("round 2", (1, 100.0), False),
        ("round 2", (2, 0.0), True),
        ("round 2 50%", (2, 49.9), False),
        ("round 2 50%", (2, 50.0), True),
        ("round 2 50%", (3, 80.0), False),
        ("round 1 100%", (1, 100.0), True),
    ],
)
def test_rounds_are_reached_by_number_and_percentage(points, events, armed, passed, holds):
    points.arm(armed, 1)
    points.reach_round(*passed)
    events.close()
    assert bool(list(events.watch())) is holds


@pytest.mark.parametrize(
    "unknown", ["", "round", "round 0", "round 2 101%", "round 2 %", "commit", "stop_copy "]
)
def test_an_unknown_point_is_refused_with_the_known_ones(points, unknown):
    with pytest.raises(ValueError, match="known points: round N"):
        points.arm(unknown)


def test_points_belong_to_the_node_that_reaches_them():
    assert round_point("round 12 5%") == (12, 5)
    assert side_of("round 12 5%") == "source"
    assert {side_of(name) for name in SOURCE_POINTS} == {"source"}
    assert {side_of(name) for name in DEST_POINTS} == {"dest"}


def test_every_point_is_reached_by_some_command():
    """A point that no command reaches would hold nobody, and its fault would never come."""
    source = {*source_reached.BEFORE.values(), *source_reached.AFTER.values(), "last_harvest"}
    dest = {*dest_reached.BEFORE.values(), *dest_reached.AFTER.values(), *dest_reached.RECORDED.values()}
    assert source | set(source_reached.RECORDED.values()) == set(SOURCE_POINTS)
    assert dest == set(DEST_POINTS)


@pytest.mark.parametrize(("state", "point"), source_reached.RECORDED.items())
def test_a_record_is_reached_after_it_is_durable(points, events, state, point):
    points.arm(point, 1)
    source_reached.reach_after(points, do.RecordState(None, state))
    events.close()
    assert [fact.name for fact in events.watch()] == ["point_reached", "point_released"]


def test_the_destination_passes_its_other_records_without_a_stop(points, events):
    points.arm("prepared.recorded", 1)
    dest_reached.reach_after(points, do.RecordState(None, Recorded.ABORTED))
    dest_reached.reach_after(points, do.RecordState(None, Recorded.PREPARED))
    events.close()
    assert [fact.name for fact in events.watch()] == ["point_reached", "point_released"]
