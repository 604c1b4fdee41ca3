"""Faults of processes on local hosts, as a scenario orders them, and what the guest makes of it."""

import pytest

from tests.live.runs import TINY, WRITER, ends, guest_is_whole, perform, scenario

pytestmark = pytest.mark.live


def ordered(tmp_path, faults, expect, text=TINY):
    run = perform(tmp_path, scenario(text=text + faults, expect=expect))
    assert (run.result.outcome, run.exit_code) == (expect, 0), run.judgement.reasons
    return run


def test_a_destination_killed_at_prepare_costs_the_guest_nothing(tmp_path):
    killed = '[[fault]]\nkind = "kill"\nwhat = "dest_node"\nat = "prepare.received"\n'
    record = guest_is_whole(ordered(tmp_path, killed, "cancelled"), "source")
    reached = record.last("point_reached", "dest")
    died = record.last("process_ended")
    assert reached.fields == {"point": "prepare.received"}
    assert record.last("fault_applied").at_ns > reached.at_ns
    assert record.last("prepared") is None, "it was held there until it was dead"
    assert died is not None
    assert "link_timeout_paused = 1000 ms" in record.ended.fields["reason"], (
        "the guest stood still for so long"
    )


def test_a_source_killed_after_commit_is_started_again_and_knows_the_outcome(tmp_path):
    killed = (
        '[[fault]]\nkind = "kill"\nwhat = "source_node"\nat = "commit.sent"\nfor = "300ms"\nrestart = true\n'
    )
    run = ordered(tmp_path, killed, "completed")
    record = guest_is_whole(run, "dest")
    (fault,) = run.result.faults
    assert (fault.kind, fault.host, fault.at, fault.packets) == ("kill", "source", "commit.sent", None)
    assert fault.healed_at_ms - fault.applied_at_ms >= 300
    assert run.result.integrity.mismatches == 0
    assert run.result.integrity.compared_pages == record.pages, "memory was proved the same all the same"


def test_pauses_by_time_and_by_round_are_applied_and_healed_and_the_migration_goes_on(tmp_path):
    paused = (
        '[[fault]]\nkind = "pause"\nwhat = "source_node"\nat = "50ms"\nfor = "200ms"\n'
        '[[fault]]\nkind = "pause"\nwhat = "dest_node"\nat = "round 2"\nfor = "300ms"\n'
    )
    run = ordered(tmp_path, paused, "completed", text=WRITER)
    record = guest_is_whole(run, "dest")
    by_time, by_round = run.result.faults
    assert 50 <= by_time.applied_at_ms < 1000
    assert by_time.healed_at_ms - by_time.applied_at_ms >= 200
    started = [event for event in record.all("round_started", "source") if event.fields["round"] == 2]
    held = record.last("point_reached", "source")
    ended = next(event for event in record.all("round_ended") if event.fields["round"] == 2)
    applied = next(event for event in record.all("fault_applied") if event.fields["fault"] == 1)
    assert started[0].at_ns < held.at_ns < applied.at_ns < ended.at_ns
    assert (ended.at_ns - applied.at_ns) / 1e6 >= 300, (
        "nothing is acknowledged while the destination stands still"
    )
    assert by_round.healed_at_ms is not None


def test_a_node_that_is_stopped_where_it_stands_goes_on_when_it_is_woken(tmp_path):
    paused = '[[fault]]\nkind = "pause"\nwhat = "source_node"\nat = "saved"\nfor = "300ms"\n'
    run = ordered(tmp_path, paused, "completed")
    record = guest_is_whole(run, "dest")
    (fault,) = run.result.faults
    assert 300 <= fault.healed_at_ms - fault.applied_at_ms < 5000
    assert record.last("point_released", "source").fields["why"] == "released"


def test_a_guest_agent_that_is_killed_is_a_lost_guest(tmp_path):
    killed = '[[fault]]\nkind = "kill"\nwhat = "guest_agent"\nat = "round 1 50%"\n'
    ordered(tmp_path, killed, "guest_lost")


def test_a_fault_that_never_came_makes_the_run_unknown(tmp_path):
    never = '[[fault]]\nkind = "pause"\nwhat = "guest_agent"\nat = "round 99"\nfor = "1s"\n'
    run = perform(tmp_path, scenario(text=TINY + never))
    assert run.exit_code == 4
    assert ends(run.judgement.reasons, "faults")
    assert "never came: nothing was at 'round 99'" in run.judgement.reasons[0]
