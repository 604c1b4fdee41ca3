"""A guest whose dirty rate was measured migrates as any other: nothing is forgotten, its balloon does not cross."""

from __future__ import annotations

from contextlib import suppress

import pytest

from testbed.errors import RunBrokenError
from testbed.interrupt import Interrupt
from testbed.machine.capabilities import lacks
from testbed.run.runner import conclude, record_run
from testbed.scenario.document import Scenario

BALLOONED = 8192
SCENARIO = Scenario.model_validate({
    "name": "measured", "guest": {"memory": "128MiB", "workload": [
        {"name": "freed", "fraction": 0.5, "keep": 0.1},
        {"name": "build", "jobs": 2, "arena": "6MiB", "headers": "2MiB", "objects": 4, "passes": 1,
         "rate": "16000pages/s"},
    ]},
    "balloon": {"num_pages": BALLOONED, "hints": "walk"},
    "migration": {
        "skip": "hint", "bandwidth": "60MB/s", "downtime_limit": "1ms", "rounds_max": 5,
    },
    "run": {"settle": "20ms", "run_on": "60ms"},
})  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    if missing := list(lacks(SCENARIO)):
        pytest.skip("; ".join(missing))
    replies, refusals = [], []

    def drive(session):
        replies.append(session.measure_dirty_rate(50, 3))
        hosts = session.hosts

        def during(event):
            if event.name == "round_started" and not refusals:
                with suppress(RunBrokenError):
                    hosts.source.client.measure_dirty_rate(10, 1)
                    refusals.append("none")
                    return
                refusals.append("refused")

        session.history.subscribe(during)
        session.run()

    with Interrupt() as interrupt:
        run_dir, broken = record_run(
            SCENARIO, tmp_path_factory.mktemp("runs"), interrupt, lambda _: None, drive
        )
    assert broken is None
    return replies[0], refusals, conclude(run_dir).result


def test_the_samples_are_of_the_guest(measured):
    reply, _, _ = measured
    assert reply.tracker == "uffd"
    assert len(reply.dirtied_pages) == 3
    assert 0 < reply.working_set_pages <= sum(reply.dirtied_pages)
    assert list(reply.cumulative_pages) == sorted(reply.cumulative_pages)
    assert reply.cumulative_pages[-1] == reply.working_set_pages
    assert reply.ballooned_pages == BALLOONED
    assert reply.populated_pages <= reply.pages - BALLOONED


def test_it_is_refused_while_a_migration_reads_the_dirty_log(measured):
    assert measured[1] == ["refused"]


def test_the_migration_afterwards_loses_nothing(measured):
    result = measured[2]
    assert (result.outcome, result.verdict) == ("completed", "valid"), result.reasons


def test_the_balloon_is_neither_read_nor_sent_in_an_arm_without_zero_detection(measured):
    result = measured[2]
    assert result.rounds[0].ballooned_pages == BALLOONED
    assert result.rounds[0].candidate_pages == result.guest.pages - BALLOONED
    assert result.integrity.skipped_pages_proved_ballooned == BALLOONED


def test_pages_freed_between_rounds_are_hinted_and_not_sent(measured):
    """A compiler that ended gave its arena back: what lies together of it is hinted before the next round sends."""
    result = measured[2]
    assert len(result.rounds) > 2, "the limits leave no room for a second round"
    assert sum(part.skipped_pages for part in result.rounds[1:]) > 0
    assert all(
        part.candidate_pages == part.sent_pages + part.zero_pages + part.skipped_pages
        for part in result.rounds
    )


def test_the_report_shows_predicted_beside_measured(measured):
    predicted = measured[2].predicted
    assert predicted is not None
    assert measured[2].downtime_ms_estimated is not None
    assert predicted.basis.startswith("round 1: ")
    # A build outruns this link, round 1 shows as much, and the rounds are as many as may be.
    assert (predicted.converges, predicted.rounds, len(measured[2].rounds)) == (False, 6, 6)
