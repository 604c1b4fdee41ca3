"""The proof catches what it is for: real runs in which one part fails silently, and the checker that says so.

Each sabotage is armed in a child process (mischief/bad_hosts.py, bad_guests.py); the rest is the product. Where an
earlier line of defence refuses the image before there is anything to judge, that is asserted first, and then this
line is taken away too.
"""

import pytest

from testbed.checkers.verdict import Verdict
from testbed.record.run_record import load
from tests.live.runs import TINY, WRITER, ends, log_of, misbehave, perform, scenario

pytestmark = pytest.mark.live


@pytest.fixture
def sabotaged(tmp_path, monkeypatch):
    """A run with these mischiefs; every one of them must have been possible to arm."""

    def run(text, *wishes, **options):
        misbehave(monkeypatch, *wishes)
        return perform(tmp_path, scenario(text=text, **options))

    return run


def says(run, checker):
    return [reason for reason in run.judgement.reasons if reason.startswith(f"{checker}: ")]


def assert_caught(run, *checkers):
    assert run.result.outcome == "completed", run.result.outcome_reason
    assert run.judgement.verdict is Verdict.INVALID
    assert run.exit_code == 1
    assert ends(run.judgement.reasons, *checkers), run.judgement.reasons


def test_a_page_wrongly_skipped_is_caught_by_memory_and_by_the_oracle(sabotaged):
    run = sabotaged(TINY, "a:host.wrong_skip")
    assert_caught(run, "memory", "oracle")
    assert "in use differ" in says(run, "memory")[0]
    assert "never sent" in says(run, "memory")[1]
    assert run.result.integrity.mismatches > 0
    assert any("kept pages are altered" in reason for reason in says(run, "oracle"))


def test_a_write_lost_after_a_harvest_is_caught_by_memory_and_by_the_oracle(sabotaged):
    run = sabotaged(WRITER, "a:host.harvest_loses_a_page")
    assert_caught(run, "memory", "oracle")
    assert says(run, "memory")[0].startswith("memory: 1 pages")
    # Lying there as it was, or written again at the destination: then a version is there twice.
    found = ("of another version", "wrote versions twice")
    assert any(words in reason for reason in says(run, "oracle") for words in found), run.judgement.reasons


def test_a_device_store_that_was_not_logged_is_caught_by_memory_alone(sabotaged):
    run = sabotaged(WRITER, "guest.floods", "a:host.stores_unlogged")
    assert_caught(run, "memory")


def test_a_dirty_log_cleared_by_hints_is_caught_by_memory_alone(sabotaged):
    """The destructive mistake of hazard 1, against the guest of test_hazards_live.py that is safe without it."""
    run = sabotaged(WRITER, "guest.takes_back_before_the_hint", "a:host.hint_clears_the_dirty_log")
    assert_caught(run, "memory")
    assert "never sent" in says(run, "memory")[1]


def test_a_stale_zero_page_is_refused_when_the_image_is_read_back(sabotaged):
    run = sabotaged(WRITER, "guest.zeroes_a_page", "b:host.zero_record_ignored", expect="failed")
    assert run.judgement.reasons == []
    assert run.result.outcome == "failed"
    assert "does not read back as it was stored" in run.result.outcome_reason


def test_a_stale_zero_page_that_nobody_read_back_is_caught_by_memory_alone(sabotaged):
    run = sabotaged(WRITER, "guest.zeroes_a_page", "b:host.zero_record_ignored", "b:host.image_not_compared")
    assert_caught(run, "memory")
    assert says(run, "memory")[0].startswith("memory: 4 pages")


def test_pages_that_were_booked_and_not_stored_are_refused_when_the_image_is_read_back(sabotaged):
    run = sabotaged(TINY, "b:host.store_dropped", expect="failed")
    assert run.judgement.reasons == []
    assert "does not read back as it was stored" in run.result.outcome_reason


def test_pages_that_were_booked_and_not_stored_are_caught_by_memory_and_by_the_oracle(sabotaged):
    run = sabotaged(TINY, "b:host.store_dropped", "b:host.image_not_compared")
    assert_caught(run, "memory", "oracle")


def test_a_bit_that_flips_on_the_way_is_refused_by_the_destination(sabotaged):
    run = sabotaged(TINY, "a:host.corrupts_in_flight", expect="failed")
    assert run.judgement.reasons == []
    assert "page differs from its hash" in run.result.outcome_reason


def test_a_consistent_rollback_of_the_whole_image_is_caught_by_the_oracle_alone(sabotaged):
    run = sabotaged(WRITER, "a:host.rolls_back")
    assert_caught(run, "oracle")
    assert run.result.integrity.mismatches == 0, "page by page, both images are the same old one"
    assert "clock went back" in says(run, "oracle")[0]
    assert "wrote versions twice" in says(run, "oracle")[1]


def test_an_overlap_of_owners_is_caught_by_owner(sabotaged):
    run = sabotaged(TINY, "a:host.resumes_after_committed")
    assert_caught(run, "owner", "oracle")
    assert "both ran the guest" in says(run, "owner")[0]


def test_an_agent_that_gave_its_guest_away_refuses_to_run_it_again(sabotaged):
    run = sabotaged(TINY, "a:host.resumes_a_frozen_guest")
    assert run.judgement.reasons == []
    refused = load(run.run_dir.path).last("resume_refused", "source")
    assert refused is not None, "the source did try"
    assert "frozen" in refused.fields["reason"]


def test_a_mischief_that_cannot_be_armed_ends_the_process_and_is_not_taken_for_a_pass(sabotaged):
    run = sabotaged(TINY, "a:host.no_such_mischief")
    assert run.result.outcome == "failed"
    assert "mischief failed" in log_of(load(run.run_dir.path), "source-node")
