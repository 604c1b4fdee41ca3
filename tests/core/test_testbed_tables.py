"""What people read: the demo's table, its sentence, summaries of several runs."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from testbed.checkers import judge
from testbed.history import Event
from testbed.record.run_record import load
from testbed.record.testing import SyntheticRun
from testbed.report.comparison import FIGURES, Figure, summarise
from testbed.report.result import build
from testbed.report.tables import compare_table, demo_table, findings_table, run_report, savings
from testbed.run.progress import Speedometer, TerminalLines


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    record = load(SyntheticRun(tmp_path_factory.mktemp("runs")).run_dir.path)
    return build(record, judge(record))


def with_wire(result, wire_bytes, total_ms):
    counted = result.bytes.model_copy(update={"wire_tx": wire_bytes})
    return result.model_copy(update={"bytes": counted, "total_ms": total_ms})


@pytest.fixture
def arms(result):
    return {
        "none": with_wire(result, 960 << 20, 1000.0),
        "zero": with_wire(result, 864 << 20, 900.0),
        "hint": with_wire(result, 240 << 20, 400.0),
        "both": with_wire(result, 200 << 20, 350.0),
    }


def rendered(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(renderable)
    return console.export_text()


def test_the_demo_says_what_the_hints_saved(arms):
    assert savings(arms) == (
        "The hints saved 720 MiB of 960 MiB on the wire (75 %) and 60 % of the time; "
        "looking for zero pages alone saved 10 % of the bytes."
    )


def test_no_sentence_is_made_from_missing_or_failed_arms(arms):
    assert savings({key: arms[key] for key in ("none", "zero", "hint")}) == ""
    assert savings({**arms, "hint": arms["hint"].model_copy(update={"outcome": "failed"})}) == ""


def test_the_demo_table_fits_into_100_columns(arms):
    text = rendered(demo_table(arms))
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 100
    for arm in ("none", "zero pages", "hinted pages", "both"):
        (row,) = [line for line in lines if line.strip().startswith(arm)]
        assert row.endswith("valid"), "every arm is one line"


def test_an_arm_that_is_not_valid_says_why(arms):
    bad = arms["hint"].model_copy(update={"verdict": "invalid", "reasons": ["memory: 3 pages differ"]})
    text = rendered(demo_table({**arms, "hint": bad}))
    assert "hint is invalid:" in text
    assert "memory: 3 pages differ" in text


def test_a_run_is_reported_with_its_rounds_and_where_it_is(result):
    text = rendered(run_report(result), width=120)
    assert "candidates" in text
    assert "0 differ" in text
    assert "never sent and proved free" in text
    assert result.run_dir.rpartition("/")[2] in text.replace("\n", "")


def test_findings_are_shown_per_checker(tmp_path):
    judgement = judge(load(SyntheticRun(tmp_path, fault="owners_overlap").run_dir.path))
    text = rendered(findings_table(judgement))
    assert "both ran the guest" in text
    assert "The run is invalid." in text


def test_medians_and_ranges_over_completed_runs(arms, result):
    failed = result.model_copy(update={"outcome": "failed", "verdict": "invalid"})
    summary = summarise([arms["none"], arms["zero"], arms["hint"], failed])
    assert summary.figures["total_ms"] == Figure(900.0, 400.0, 1000.0)
    assert summary.worst_verdict == "invalid"
    assert summary.to_dict()["runs"] == 4
    assert set(summary.to_dict()) >= set(FIGURES)
    text = rendered(compare_table({"skip none": summary}), width=120)
    assert "3/4 valid" in text


def test_a_variant_without_a_completed_run_has_no_figures(result):
    failed = result.model_copy(update={"outcome": "failed", "verdict": "invalid"})
    summary = summarise([failed])
    assert summary.figures["total_ms"] == Figure(None, None, None)
    assert "-" in rendered(compare_table({"x": summary}))


def test_the_speed_is_that_since_the_last_report():
    speed = Speedometer()
    assert speed.rate_bytes_per_s(1_000_000_000, 500) == 0.0
    assert speed.rate_bytes_per_s(1_500_000_000, 1500) == 2000.0


def test_progress_shows_round_pages_and_time_left():
    with Progress(TextColumn("x"), console=Console(file=io.StringIO())) as progress:
        show = TerminalLines(progress).begin("hint")
        show(Event(1, "testbed", "run_started", {}))
        assert progress.tasks[0].fields["step"] == "starting two hosts"
        show(Event(2, "source", "round_started", {"round": 1, "candidate_pages": 1000}))
        for at_ns, sent in ((10**9, 100), (2 * 10**9, 350)):
            fields = {"round": 1, "sent_pages": sent, "zero_pages": 0, "skipped_pages": 400}
            fields |= {"remaining_pages": 600 - sent, "payload_bytes": sent * 4096, "eta_ms": 1000.0}
            show(Event(at_ns, "source", "progress", fields))
        task = progress.tasks[0]
        assert (task.completed, task.total) == (750, 1000)
        assert task.fields["detail"] == "0.98 MiB/s, 0.98 MiB left, over in at least 1.00 s"
