"""The history of a node has an end: what a flood makes of it, and what a watcher is told of that."""

import json

import pytest

from host import event_log
from host.event_log import EventLog


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(event_log, "EVENTS_MAX", 8)
    monkeypatch.setattr(event_log, "PROGRESS_EVENTS_MAX", 4)
    log = EventLog("a")
    yield log
    log.close()


def told(log):
    return [(fact.name, json.loads(fact.fields_json)) for fact in log.watch(lambda: False)]


def test_beyond_the_limit_the_oldest_go_and_the_newest_are_always_told(log):
    for number in range(100):
        log.add("call", number=number)
    log.add("migration_ended")
    assert len(log._facts) <= 8
    (first, dropped), *rest = told(log)
    assert first == "events_dropped"
    assert dropped == {"events": 101 - len(rest)}
    assert [fields["number"] for name, fields in rest if name == "call"] == list(range(101 - len(rest), 100))
    assert rest[-1][0] == "migration_ended"


def test_a_watcher_that_keeps_up_misses_nothing_and_one_that_does_not_is_told_how_much(log):
    watching = log.watch()
    for number in range(30):
        log.add("call", number=number)
        assert json.loads(next(watching).fields_json) == {"number": number}
    for number in range(30, 60):
        log.add("call", number=number)
    late = next(watching)
    assert (late.name, json.loads(late.fields_json)["events"]) == (
        "events_dropped",
        60 - 30 - len(log._facts),
    )
    assert json.loads(next(watching).fields_json)["number"] == 60 - len(log._facts)


def test_progress_ends_first(log):
    for _ in range(10):
        log.add("progress")
    log.add("round_ended")
    assert [name for name, _ in told(log)] == ["progress"] * 4 + ["round_ended"]
