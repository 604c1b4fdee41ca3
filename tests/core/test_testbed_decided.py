"""What a run tells about its limits: keys and conflicts, the request, decisions, attempts, pages sent again."""

import json

import pytest

from testbed.analysis.decided import worth_another_attempt
from testbed.checkers import judge
from testbed.checkers.verdict import Verdict
from testbed.history import Event
from testbed.record.run_record import load
from testbed.record.testing import SyntheticRun
from testbed.report.result import build
from testbed.scenario.migration_keys import Migration, migrate_request
from tests.core.test_testbed_scenario import GOOD, problems_of


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (["migration.on_stall=throttle"], "migration.throttle: is missing: on_stall = 'throttle' needs"),
        (["migration.throttle.maximum=80"], "migration.throttle: means nothing with on_stall = 'none'"),
        (
            ["migration.on_stall=throttle", "migration.throttle.start=10"],
            "migration.throttle.maximum: is missing",
        ),
        (
            ["migration.on_stall=throttle", "migration.throttle.maximum=10"],
            "migration.throttle.start: 20 % is above the maximum of 10 %",
        ),
        (["migration.throttle.maximum=100"], "migration.throttle.maximum: 100"),
        (
            ["migration.timeout=0", "migration.on_timeout=switch"],
            "migration.on_timeout: 'switch' means nothing",
        ),
        (["migration.link_timeout=2min"], "migration.link_timeout: 120000 ms outlast"),
        (["migration.on_stall=hope"], "migration.on_stall: 'hope' is not one of"),
        (["migration.retries=-1"], "migration.retries: -1"),
        (["migration.streams=65"], "migration.streams: 65"),
    ],
)
def test_limits_that_mean_nothing_are_told_with_the_way_out(override, complaint):
    assert any(problem.startswith(complaint) for problem in problems_of(GOOD, override)), problems_of(
        GOOD, override
    )


def test_the_section_becomes_the_request():
    options = Migration.model_validate(
        {
            "on_stall": "throttle",
            "throttle": {"maximum": 70},
            "on_timeout": "switch",
            "link_timeout": "2s",
            "streams": 3,
            "compression": "zstd",
            "delta_cache": "64MiB",
        }
    )
    request = migrate_request(
        options, migration="m", attempt=2, dest_address="h:1", dest_server_name="b", rehearsal=False
    )
    steps = (
        request.throttle_start_percent,
        request.throttle_increment_percent,
        request.throttle_maximum_percent,
    )
    assert steps == (20, 10, 70)
    assert (request.attempt, request.on_stall, request.on_timeout) == (2, "throttle", "switch")
    assert (request.link_timeout_ms, request.streams, request.compression) == (2_000, 3, "zstd")
    assert request.delta_cache_bytes == 64 << 20


@pytest.mark.parametrize(
    ("cause", "worth_it"),
    [
        ("link", True),
        ("destination", True),
        ("host", False),
        ("limit", False),
        ("request", False),
        ("", False),
    ],
)
def test_only_what_may_go_better_is_tried_again(cause, worth_it):
    ended = Event(1, "source", "migration_ended", {"outcome": "cancelled", "cause": cause})
    assert worth_another_attempt(ended) is worth_it


def events_of(run):
    return [json.loads(line) for line in run.run_dir.events.read_text().splitlines()]


def rewrite(run, events):
    run.run_dir.events.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_rounds_and_ledger_are_those_of_the_last_attempt(tmp_path):
    run = SyntheticRun(tmp_path)
    events = events_of(run)
    first = next(index for index, event in enumerate(events) if event["name"] == "migration_requested")
    at_ns = events[first]["at_ns"]
    rounds = [dict(event) for event in events if event["name"] == "round_ended"][:1]
    asked = {**events[first], "at_ns": at_ns - 5}
    for number, event in enumerate(rounds):
        event["at_ns"] = at_ns - 4 + number
    ended = {
        "at_ns": at_ns - 1,
        "origin": "source",
        "name": "migration_ended",
        "fields": {"outcome": "cancelled", "reason": "gone", "cause": "link"},
    }
    rewrite(run, [*events[:first], asked, *rounds, ended, *events[first:]])
    record = load(run.run_dir.path)
    judgement = judge(record)
    assert judgement.verdict is Verdict.VALID, judgement.reasons
    result = build(record, judgement)
    assert result.attempts == 2
    assert [part.index for part in result.rounds] == list(range(1, len(result.rounds) + 1))


@pytest.mark.parametrize(
    ("resent", "recoveries", "verdict"),
    [
        (7, {"count": 1, "paused_ms": 5.0, "resent_pages": 7}, Verdict.VALID),
        (7, {"count": 1, "paused_ms": 5.0, "resent_pages": 8}, Verdict.UNKNOWN),
        (7, {"count": 0, "paused_ms": 0.0, "resent_pages": 7}, Verdict.UNKNOWN),
    ],
)
def test_pages_sent_again_are_in_no_sum_and_need_a_lost_link(tmp_path, resent, recoveries, verdict):
    run = SyntheticRun(tmp_path)
    events = events_of(run)
    next(event for event in events if event["name"] == "round_ended")["fields"]["resent_pages"] = resent
    next(e for e in events if e["name"] == "migration_ended")["fields"]["recoveries"] = recoveries
    rewrite(run, events)
    assert judge(load(run.run_dir.path)).findings["rounds"].verdict is verdict


def test_decisions_are_told_in_their_order_with_their_reasons(tmp_path):
    run = SyntheticRun(tmp_path)
    events = events_of(run)
    for event in events:
        if event["name"] == "round_ended":
            event["fields"] |= {"decision": "next_round", "reason": f"round {event['fields']['round']}"}
    at_ns = max(event["at_ns"] for event in events if event["name"] == "round_ended")
    lost = {"phase": "SENDING", "reason": "cut", "link_timeout_ms": 9}
    for number, (name, fields) in enumerate(
        [("link_lost", lost), ("link_restored", {"paused_ms": 12.3, "resent_pages": 4})], start=1
    ):
        events.append({"at_ns": at_ns + number, "origin": "source", "name": name, "fields": fields})
    rewrite(run, events)
    record = load(run.run_dir.path)
    decisions = build(record, judge(record)).decisions
    assert [one.decision for one in decisions[-2:]] == ["reconnect", "go_on"]
    assert decisions[-2].reason == "cut"
    assert "12 ms" in decisions[-1].reason
    assert [one.round for one in decisions[:-2]] == list(range(1, len(decisions) - 1))
    assert [one.at_ms for one in decisions] == sorted(one.at_ms for one in decisions)
