"""Rehearsals with real processes: everything but the hand-over, and the guest goes on where it is."""

import pytest

from testbed.record.run_record import load
from testbed.scenario.file import parse
from tests.live.runs import TINY, perform

pytestmark = pytest.mark.live


def rehearsal(*overrides):
    chosen = ("migration.rehearsal=true", "expect=rehearsal", *overrides)
    return parse(TINY, default_name="rehearsal", overrides=chosen)


@pytest.mark.parametrize("tracker", ["auto", "hash"])
def test_a_rehearsal_is_compared_page_by_page_and_the_guest_goes_on_at_the_source(tmp_path, tracker):
    run = perform(tmp_path, rehearsal(f"migration.tracker={tracker}"))
    assert run.judgement.reasons == []
    result = run.result
    assert result.outcome == "rehearsal"
    assert result.integrity.compared_pages == result.guest.pages
    assert result.integrity.mismatches == 0
    assert result.hints.skipped_pages > 0
    assert 0 < result.downtime_ms <= result.guest_blackout_ms
    states = {event.fields["host"]: event.fields["state"] for event in run_events(run, "final_status")}
    assert states == {"source": "paused", "dest": "standby"}, "checked at the source, where it went on"


def test_nothing_is_recorded_that_gives_the_guest_away(tmp_path):
    run = perform(tmp_path, rehearsal())
    names = [event.name for event in run_events(run)]
    assert "rehearsed" in names
    assert not {"prepared", "committed", "guest_running"} & set(names)


def run_events(run, name=None):
    return [event for event in load(run.run_dir.path).events if name in (None, event.name)]
