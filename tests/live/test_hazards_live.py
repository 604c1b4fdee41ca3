"""Hazards of hinting end to end: a guest that no host may trust, or one in need, migrates and loses nothing.

Pure and two-process tests of the same hazards: tests/core/test_virtio_hazards.py, test_virtio_untrusted_rings.py,
test_migration_machines.py; tests/live/test_host_balloon_server.py, test_agent_balloon.py. Here whole migrations are
proved: every page that the guest uses at the end is at the destination as it was at the source.
"""

import os
import signal

import pytest

from testbed.checkers import memory
from testbed.record.run_record import load
from tests.live.runs import WRITER, Bed, guest_is_whole, log_of, misbehave, perform, scenario, waited_for

pytestmark = pytest.mark.live

SHORT_WAIT = ("migration.hint_wait=50ms",)


@pytest.fixture
def migrates(tmp_path, monkeypatch):
    """A valid migration of a guest with this behaviour; (record, result)."""

    def run(*wishes, overrides=(), done=True):
        misbehave(monkeypatch, *wishes)
        finished = perform(tmp_path, scenario(*overrides, text=WRITER))
        assert finished.judgement.reasons == []
        assert finished.result.outcome == "completed"
        record = guest_is_whole(finished, "dest") if done else load(finished.run_dir.path)
        return record, finished.result

    return run


def test_hazard_1_a_block_written_before_its_hint_is_processed_is_sent(migrates):
    _, result = migrates("guest.takes_back_before_the_hint")
    assert result.hints.redirtied_pages >= 1024, "blocks that were hinted, and in use by then"
    assert result.hints.skipped_pages > result.hints.redirtied_pages


def test_hazard_1_and_11_held_blocks_taken_back_under_pressure_and_written_are_sent(migrates):
    record, result = migrates("guest.hungry")
    assert "of them held" in log_of(record, "source-agent")
    assert result.hints.redirtied_pages >= 1024, (
        "what it wrote while round 1 went: a slow machine's guest is slow"
    )
    assert result.integrity.skipped_pages_proved_free > 0


def test_hazard_2_and_3_hints_that_go_on_into_later_rounds_are_stale(migrates):
    _, result = migrates("guest.hints_on")
    assert result.hints.stale_pages > 0
    assert result.hints.skipped_pages > 0
    assert len(result.rounds) >= 3


def test_hazard_3_replayed_ids_and_late_stops_skip_nothing(migrates):
    _, result = migrates("guest.replays_ids", overrides=SHORT_WAIT)
    assert result.hints.stale_pages > 0
    assert [entry["hinted_pages"] for entry in result.hints.rounds[1:]] == [0] * (
        len(result.hints.rounds) - 1
    )


def test_hazard_4_a_report_that_never_ends_delays_each_round_by_the_bounded_wait(migrates):
    record, result = migrates("guest.never_ends_its_report", overrides=SHORT_WAIT, done=False)
    assert not [event for event in record.all("hints_stopped", "source") if event.fields["reason"] == "stop"]
    assert result.hints.skipped_pages > 0, "what was hinted before it fell silent counts"


def test_hazard_4_and_8_a_flood_of_repeated_overlapping_and_partial_ranges_counts_each_page_once(migrates):
    record, result = migrates("guest.floods")
    ranges = sum(event.fields["hint_ranges"] for event in record.all("round_ended", "source"))
    assert ranges > 1000
    assert result.hints.skipped_pages % 1024 == 0, "whole blocks, and nothing of the pages beside them"
    for entry in result.hints.rounds:
        assert entry["hinted_pages"] <= result.guest.pages


def test_hazard_4_a_guest_that_dies_in_the_middle_of_its_report_is_lost_and_nobody_runs_it(
    tmp_path, monkeypatch
):
    misbehave(monkeypatch, "guest.never_ends_its_report")
    agents = {}

    def watch(event):
        if event.name == "process_started":
            agents[event.fields["process"]] = event.fields["pid"]
        if event.name == "hints_opened" and "source-agent" in agents:
            os.kill(agents.pop("source-agent"), signal.SIGKILL)

    chosen = scenario("migration.hint_wait=10s", text=WRITER, expect="guest_lost")
    run = perform(tmp_path, chosen, watch)
    assert run.result.outcome == "guest_lost", run.result.outcome_reason
    assert run.judgement.reasons == []
    assert not len(load(run.run_dir.path).beats["dest"])


def test_hazard_5_done_reaches_the_guest_at_the_source_after_a_cancel_and_the_next_report_works(tmp_path):
    with Bed(tmp_path, scenario("migration.bandwidth=4MiB/s", text=WRITER)) as bed:
        since_ns = bed.begin()
        bed.wait("hints_stopped", "source", since_ns, reason="stop")
        assert bed.source.guest_status().held_pages > 0, "or DONE would change nothing"
        bed.source.cancel("the test")
        ended = bed.wait("migration_ended", "source", since_ns)
        assert ended.fields["outcome"] == "cancelled"
        bed.guest_is_back()
        ended = bed.migrate(bandwidth_bytes_per_second=0)
        assert ended.fields["outcome"] == "completed"
        assert ended.fields["hints"]["skipped_pages"] > 0
        bed.wait("hints_done", "dest")
        waited_for(lambda: bed.dest.guest_status().held_pages == 0, "DONE from the destination")
        bed.check(bed.dest)


def test_hazard_9_lies_in_chains_cost_the_guest_nothing_but_its_chains(migrates):
    record, result = migrates("guest.lies_in_chains")
    assert "mischief: lied" in log_of(record, "source-agent")
    assert result.hints.skipped_pages > 0, "the good ones among them count"
    sent = record.u8("sent")
    assert sent is not None
    assert sent[0], "the boot page, which a chain that points at itself named"


def test_hazard_9_a_ruined_ring_ends_the_hints_and_not_the_migration(migrates):
    _, result = migrates("guest.breaks_its_ring", overrides=SHORT_WAIT, done=False)
    assert result.hints.hinted_pages == 0


def test_hazard_12_a_retry_at_the_same_destination_starts_from_known_zero(tmp_path):
    """The first attempt sends all of RAM, the second skips what is free: nothing of the first may be left."""
    with Bed(tmp_path, scenario("migration.bandwidth=64MiB/s", text=WRITER)) as bed:
        since_ns = bed.begin(skip="none")
        bed.wait_for(
            lambda event: event.name == "progress" and event.fields["sent_pages"] > 6000, "6000 pages sent"
        )
        bed.source.cancel("the test")
        first = bed.wait("migration_ended", "source", since_ns)
        assert first.fields["outcome"] == "cancelled"
        bed.wait("aborted", "dest", since_ns)
        second = bed.migrate(skip="both")
        assert second.fields["outcome"] == "completed", second.fields["reason"]
        bed.fetch("source_hashes", "frames", "sent", "dest_hashes")
        bed.check(bed.dest)
    record = load(bed.run_dir.path)
    assert memory.check(record).reasons == ()
    sent, dest = record.u8("sent"), record.u64("dest_hashes")
    skipped = dest[sent == memory.NEVER_SENT]
    assert len(skipped) > 4096
    assert (skipped == memory.ZERO_PAGE_HASH).all(), "skipped pages are zero at the destination"


def test_hazard_13_a_balloon_that_moves_in_mid_migration_loses_nothing(tmp_path):
    with Bed(tmp_path, scenario("migration.bandwidth=32MiB/s", "migration.skip=zero", text=WRITER)) as bed:
        since_ns = bed.begin()
        bed.wait("progress", "source", since_ns)
        bed.source.set_balloon(4096)
        waited_for(lambda: bed.source.guest_status().actual == 4096, "the balloon to inflate")
        bed.source.set_balloon(1024)
        waited_for(lambda: bed.source.guest_status().actual == 1024, "the balloon to deflate")
        ended = bed.wait("migration_ended", "source", since_ns)
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        bed.fetch("source_hashes", "frames", "sent", "dest_hashes")
        bed.wait("guest_running", "dest")
        assert bed.dest.guest_status().ballooned_pages == 1024
        bed.dest.set_balloon(0)
        waited_for(lambda: bed.dest.guest_status().ballooned_pages == 0, "the balloon to deflate there")
        bed.check(bed.dest)
    assert memory.check(load(bed.run_dir.path)).reasons == ()
