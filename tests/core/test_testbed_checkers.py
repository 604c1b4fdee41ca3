"""The checkers catch what they are for, and say valid where nothing is wrong.

Each fault below goes wrong inside a small real pre-copy (testbed/record/testing.py); the evidence is computed from
the memory that results.
"""

import json

import numpy as np
import pytest

from testbed.checkers import CHECKERS, judge
from testbed.checkers.verdict import Verdict, valid
from testbed.record.run_record import load
from testbed.record.testing import FREED, PAGES, STORE, SyntheticRun
from testbed.report.result import build


def judged(run):
    return judge(load(run.run_dir.path))


def edit_events(run, change):
    """Rewrites the history: `change` gets each event and returns it, changed or None."""
    lines = run.run_dir.events.read_text().splitlines()
    events = [changed for line in lines if (changed := change(json.loads(line))) is not None]
    run.run_dir.events.write_text("".join(json.dumps(event) + "\n" for event in events))


def edit_fields(run, name, **fields):
    def change(event):
        if event["name"] == name:
            event["fields"].update(fields)
        return event

    edit_events(run, change)


def drop(run, name):
    edit_events(run, lambda event: None if event["name"] == name else event)


def test_a_good_run_is_valid_for_every_checker(tmp_path):
    judgement = judged(SyntheticRun(tmp_path))
    assert {name: finding.verdict for name, finding in judgement.findings.items()} == dict.fromkeys(
        CHECKERS, Verdict.VALID
    )
    assert judgement.reasons == []
    memory = judgement.findings["memory"].figures
    assert memory["compared_pages"] == PAGES
    assert memory["mismatches"] == 0
    assert memory["skipped_pages_proved_free"] >= FREED.stop - FREED.start


@pytest.mark.parametrize(
    ("fault", "checker", "verdict"),
    [
        ("page_wrongly_skipped", "memory", Verdict.INVALID),
        ("write_lost_after_harvest", "memory", Verdict.INVALID),
        ("device_store_not_logged", "memory", Verdict.INVALID),
        ("stale_zero_page", "memory", Verdict.INVALID),
        ("image_rolled_back", "oracle", Verdict.INVALID),
        ("owners_overlap", "owner", Verdict.INVALID),
        ("wire_miscounted", "bytes", Verdict.UNKNOWN),
        ("ledger_unbalanced", "ledger", Verdict.UNKNOWN),
    ],
)
def test_a_fault_turns_the_verdict_of_the_checker_that_is_for_it(tmp_path, fault, checker, verdict):
    judgement = judged(SyntheticRun(tmp_path, fault=fault))
    assert judgement.findings[checker].verdict is verdict
    assert judgement.findings[checker].reasons
    assert judgement.verdict is verdict
    against = {name for name, finding in judgement.findings.items() if finding.verdict is not Verdict.VALID}
    assert against == {checker}, "a fault is told by the checker that is for it, not by chance"


def test_a_consistent_rollback_passes_the_memory_comparison_and_not_the_oracle(tmp_path):
    """The image is the same on both hosts: only what is kept outside of it can tell."""
    judgement = judged(SyntheticRun(tmp_path, fault="image_rolled_back"))
    assert judgement.findings["memory"].verdict is Verdict.VALID
    assert any("older image" in reason for reason in judgement.findings["oracle"].reasons)


def test_a_failed_self_check_is_invalid_even_when_clock_and_log_are_in_order(tmp_path):
    run = SyntheticRun(tmp_path)
    edit_fields(run, "guest_checked", ok=False, problems=["kv-1: item 7 has version 3, expected 4"])
    assert judged(run).findings["oracle"].reasons == ("kv-1: item 7 has version 3, expected 4",)


def test_versions_written_twice_are_caught_though_the_last_ones_are_right(tmp_path):
    run = SyntheticRun(tmp_path)
    path = run.run_dir.artefact("source.oracle")
    data = path.read_bytes()
    path.write_bytes(data + data[-16:])
    finding = judged(run).findings["oracle"]
    assert finding.verdict is Verdict.INVALID
    assert "older image" in finding.reasons[0]


def test_a_self_check_that_saw_too_little_is_unknown(tmp_path):
    run = SyntheticRun(tmp_path)
    edit_fields(run, "guest_checked", checked_items=1)
    assert judged(run).findings["oracle"].verdict is Verdict.UNKNOWN


def test_a_self_check_at_the_wrong_host_is_unknown(tmp_path):
    run = SyntheticRun(tmp_path)
    edit_fields(run, "guest_checked", host="source")
    assert judged(run).findings["oracle"].verdict is Verdict.UNKNOWN


def test_a_missing_self_check_is_unknown(tmp_path):
    run = SyntheticRun(tmp_path)
    drop(run, "guest_checked")
    assert judged(run).findings["oracle"].verdict is Verdict.UNKNOWN


def test_an_unsent_used_page_is_invalid_even_when_both_sides_agree(tmp_path):
    """Stale data at the destination can be right by accident; nobody sent it."""
    run = SyntheticRun(tmp_path)
    sent = np.fromfile(run.run_dir.artefact("sent"), dtype=np.uint8)
    sent[STORE.start + 9] = 0
    sent.tofile(run.run_dir.artefact("sent"))
    finding = judged(run).findings["memory"]
    assert finding.verdict is Verdict.INVALID
    assert "never sent" in finding.reasons[0]
    assert str(STORE.start + 9) in finding.reasons[0]


@pytest.mark.parametrize("name", ["source_hashes", "dest_hashes", "frames", "sent"])
def test_missing_evidence_is_unknown(tmp_path, name):
    run = SyntheticRun(tmp_path)
    run.run_dir.artefact(name).unlink()
    finding = judged(run).findings["memory"]
    assert finding.verdict is Verdict.UNKNOWN
    assert name in finding.reasons[0]


def test_evidence_of_another_size_is_unknown(tmp_path):
    run = SyntheticRun(tmp_path)
    run.run_dir.artefact("frames").write_bytes(bytes(PAGES - 1))
    assert judged(run).findings["memory"].verdict is Verdict.UNKNOWN


def test_epochs_that_skip_one_are_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    path = run.run_dir.artefact("dest.beats")
    words = np.fromfile(path, dtype="<u8").reshape(-1, 3)
    words[:, 1] = 3
    words.tofile(path)
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.INVALID
    assert "not as 2" in finding.reasons[0]


def test_one_epoch_on_two_hosts_is_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    path = run.run_dir.artefact("dest.beats")
    words = np.fromfile(path, dtype="<u8").reshape(-1, 3)
    words[:, 1] = 1
    words.tofile(path)
    assert judged(run).findings["owner"].verdict is Verdict.INVALID


def test_a_completed_migration_whose_guest_never_beat_is_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    run.run_dir.artefact("dest.beats").write_bytes(b"")
    assert judged(run).findings["owner"].verdict is Verdict.INVALID


def test_two_hosts_that_hold_the_guest_in_the_end_are_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    edit_fields(run, "final_status", state="paused")
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.INVALID
    assert "alone" in finding.reasons[0]


def cancelled(run):
    edit_fields(run, "migration_ended", outcome="cancelled", reason="by the test")


def test_a_cancelled_migration_must_leave_the_guest_at_the_source(tmp_path):
    run = SyntheticRun(tmp_path)
    cancelled(run)
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.INVALID
    assert "destination" in finding.reasons[0]


def test_a_cancelled_migration_whose_guest_stands_still_is_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    cancelled(run)
    run.run_dir.artefact("dest.beats").write_bytes(b"")
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.INVALID
    assert "did not go on" in finding.reasons[0]


def test_another_outcome_than_expected_is_told_with_its_reason(tmp_path):
    run = SyntheticRun(tmp_path)
    cancelled(run)
    judgement = judged(run)
    assert judgement.findings["expectation"].verdict is Verdict.INVALID
    assert "by the test" in judgement.findings["expectation"].reasons[0]


def test_a_run_without_an_outcome_is_not_valid(tmp_path):
    run = SyntheticRun(tmp_path)
    drop(run, "migration_ended")
    judgement = judged(run)
    assert judgement.findings["owner"].verdict is Verdict.UNKNOWN
    assert judgement.verdict is Verdict.INVALID
    assert load(run.run_dir.path).outcome == "failed"


@pytest.mark.parametrize(
    ("name", "fields", "checker", "verdict"),
    [
        ("round_ended", {"candidate_pages": 5}, "rounds", Verdict.UNKNOWN),
        ("round_ended", {"payload_bytes": 1}, "rounds", Verdict.UNKNOWN),
        ("round_ended", {"round": 1}, "rounds", Verdict.UNKNOWN),
        ("round_ended", {"dirtied_pages": PAGES + 1}, "rounds", Verdict.UNKNOWN),
        ("round_ended", {"skipped_pages": 1}, "ledger", Verdict.UNKNOWN),
    ],
)
def test_figures_that_contradict_each_other_are_unknown(tmp_path, name, fields, checker, verdict):
    run = SyntheticRun(tmp_path)
    edit_fields(run, name, **fields)
    assert judged(run).findings[checker].verdict is verdict


@pytest.mark.parametrize("skip", ["none", "zero"])
def test_pages_skipped_unasked_are_invalid(tmp_path, skip):
    run = SyntheticRun(tmp_path)
    manifest = json.loads(run.run_dir.manifest.read_text())
    manifest["scenario"]["migration"] = {"skip": skip}
    run.run_dir.manifest.write_text(json.dumps(manifest))
    assert judged(run).findings["ledger"].verdict is Verdict.INVALID


def test_zero_records_unasked_are_invalid(tmp_path):
    run = SyntheticRun(tmp_path)
    manifest = json.loads(run.run_dir.manifest.read_text())
    manifest["scenario"]["migration"] = {"skip": "hint"}
    run.run_dir.manifest.write_text(json.dumps(manifest))
    assert judged(run).findings["rounds"].verdict is Verdict.INVALID


def test_a_wire_that_was_not_counted_is_unknown(tmp_path):
    run = SyntheticRun(tmp_path)
    counted = {"payload": 4325376, "grpc": 4334224, "wire_tx": 0, "wire_rx": 0, "wire_source": "tcp_info"}
    edit_fields(run, "migration_ended", bytes=counted)
    assert "the wire was not counted" in judged(run).findings["bytes"].reasons


def test_a_checker_that_crashes_says_unknown(tmp_path):
    def crashes(_record):
        raise ZeroDivisionError("by the test")

    run = SyntheticRun(tmp_path)
    judgement = judge(load(run.run_dir.path), {"fine": lambda _: valid(), "crashes": crashes})
    assert judgement.verdict is Verdict.UNKNOWN
    assert judgement.reasons == ["crashes: the checker crashed: ZeroDivisionError: by the test"]


def test_invalid_outweighs_unknown(tmp_path):
    run = SyntheticRun(tmp_path, fault="owners_overlap")
    run.run_dir.artefact("frames").unlink()
    judgement = judged(run)
    assert judgement.verdict is Verdict.INVALID
    assert judgement.reasons[0].startswith("owner:")


def test_the_result_document_has_what_the_design_promises(tmp_path):
    run = SyntheticRun(tmp_path)
    record = load(run.run_dir.path)
    document = build(record, judge(record)).to_dict()
    promised = [
        "schema", "scenario", "seed", "outcome", "verdict", "reasons", "engine", "total_ms", "setup_ms",
        "downtime_ms", "guest_blackout_ms", "guest", "rounds", "hints", "bytes", "integrity", "faults",
        "cpu_seconds",
    ]  # fmt: skip
    assert [key for key in promised if key not in document] == []
    assert document["schema"] == 1
    assert document["verdict"] == "valid"
    assert document["guest_blackout_ms"] == 32.0, "last beat at 998 ms, first one there at 1030 ms"
    assert document["guest"] == {
        "memory_bytes": 16 << 20,
        "pages": PAGES,
        "free_pages_at_start": 3000,
        "ballooned_pages_at_start": 0,
    }
    assert [part["index"] for part in document["rounds"]] == [1, 2]
    assert document["cpu_seconds"] == {"source": 0.1, "dest": 0.2, "guest": 0.3}
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("fault", [None, "owners_overlap"])
def test_a_source_without_beats_is_unknown_also_where_owners_overlapped(tmp_path, fault):
    run = SyntheticRun(tmp_path, fault=fault)
    run.run_dir.artefact("source.beats").unlink()
    assert judged(run).findings["owner"].verdict is Verdict.UNKNOWN


@pytest.mark.parametrize("host", ["source", "dest"])
def test_a_host_whose_last_state_is_missing_is_unknown(tmp_path, host):
    run = SyntheticRun(tmp_path)
    edit_events(
        run,
        lambda event: None if event["name"] == "final_status" and event["fields"]["host"] == host else event,
    )
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.UNKNOWN
    assert host in finding.reasons[0]


def test_a_guest_is_not_lost_because_somebody_says_so(tmp_path):
    run = SyntheticRun(tmp_path)
    edit_fields(run, "migration_ended", outcome="guest_lost")
    finding = judged(run).findings["owner"]
    assert finding.verdict is Verdict.INVALID
    assert "no agent's process ended" in finding.reasons[0]


def test_a_store_that_logged_nothing_proves_nothing(tmp_path):
    run = SyntheticRun(tmp_path)
    manifest = json.loads(run.run_dir.manifest.read_text())
    manifest["scenario"]["guest"]["workload"] = [{"name": "kv", "records": 100, "operations_per_second": 10}]
    run.run_dir.manifest.write_text(json.dumps(manifest))
    edit_fields(run, "guest_checked", checked_items=0, expected_items=0)
    assert judged(run).findings["oracle"].verdict is Verdict.UNKNOWN


def expecting_corruption(run):
    manifest = json.loads(run.run_dir.manifest.read_text())
    manifest["scenario"]["expect"] = "corruption"
    run.run_dir.manifest.write_text(json.dumps(manifest))
    return run


def edit_check(run, problem):
    edit_fields(run, "guest_checked", ok=False, problems=[problem])
    return run


def test_lost_writes_that_were_expected_and_found_are_invalid_and_as_expected(tmp_path):
    run = expecting_corruption(SyntheticRun(tmp_path, fault="page_wrongly_skipped"))
    judgement = judged(edit_check(run, "retake-2: kept pages are altered: 64 items"))
    assert judgement.verdict is Verdict.INVALID, "a run that lost writes is never called valid"
    assert judgement.invalid_as_expected
    assert judgement.exit_code == 0


def test_lost_writes_that_only_one_proof_shows_are_not_what_was_expected(tmp_path):
    judgement = judged(expecting_corruption(SyntheticRun(tmp_path, fault="page_wrongly_skipped")))
    assert judgement.verdict is Verdict.INVALID
    assert judgement.exit_code == 1
    assert any("memory invalid" in reason for reason in judgement.findings["expectation"].reasons)


def test_lost_writes_that_were_expected_and_are_not_there_are_a_finding(tmp_path):
    judgement = judged(expecting_corruption(SyntheticRun(tmp_path)))
    assert judgement.reasons == ["expectation: expected lost writes to be found, and none were"]
    assert judgement.exit_code == 1


def test_another_thing_that_goes_wrong_is_not_covered_by_expected_corruption(tmp_path):
    run = expecting_corruption(SyntheticRun(tmp_path, fault="owners_overlap"))
    assert judged(run).exit_code == 1


def test_lost_writes_that_nobody_expected_fail_the_run(tmp_path):
    assert judged(SyntheticRun(tmp_path, fault="page_wrongly_skipped")).exit_code == 1


def test_an_attempt_that_was_made_again_stays_in_the_result(tmp_path):
    run = SyntheticRun(tmp_path)
    ended = {"outcome": "failed", "reason": "the link was lost", "total_ms": 40.0, "downtime_ms": 25.0,
             "recoveries": {"count": 1, "paused_ms": 20.0}}  # fmt: skip
    with run.run_dir.events.open("a") as events:
        for at_ms, origin, name, fields in (
            (610, "testbed", "migration_requested", {"migration": "synthetic", "attempt": 0}),
            (650, "source", "migration_ended", ended),
        ):
            line = {"at_ns": at_ms * 1_000_000, "origin": origin, "name": name, "fields": fields}
            events.write(json.dumps(line) + "\n")
    record = load(run.run_dir.path)
    result = build(record, judge(record))
    (earlier,) = result.earlier_attempts
    assert (earlier.outcome, earlier.downtime_ms, earlier.recoveries.paused_ms) == ("failed", 25.0, 20.0)
    assert (result.attempts, result.downtime_ms) == (2, 30.0)
