"""What people read: the demo's table, its sentence, summaries of several runs."""

import io

import pytest
from rich.console import Console

from testbed.checkers import judge
from testbed.machine.checkup import Checkup
from testbed.record.run_record import load
from testbed.record.testing import SyntheticRun
from testbed.report.comparison import FIGURES, Figure, summarise
from testbed.report.course import course_lines
from testbed.report.result import build
from testbed.report.session_tables import status_table
from testbed.report.tables import (
    compare_table,
    demo_table,
    doctor_table,
    findings_table,
    run_report,
    savings,
)


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


def lines_of(renderable, width):
    """As printed; that they fit is certain, for what does not is cut: nothing may be."""
    lines = [line.rstrip() for line in rendered(renderable, width).splitlines()]
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines), lines
    return lines


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("verdict", ["valid", "invalid"])
def test_the_demo_table_is_a_line_per_arm_with_whole_figures(arms, width, verdict):
    widest = {"total_ms": 99.9, "downtime_ms": 99.9, "guest_blackout_ms": 99.9, "verdict": verdict}
    widest["bytes"] = arms["none"].bytes.model_copy(update={"payload": 9.99 * 2**30, "wire_tx": 9.99 * 2**30})
    arms = {arm: result.model_copy(update=widest) for arm, result in arms.items()}
    share = 100 * arms["hint"].hints.skipped_pages / arms["hint"].guest.pages
    lines = lines_of(demo_table(arms), width)
    for arm in ("none", "zero pages", "hinted pages", "both"):
        (row,) = [line for line in lines if line.startswith(f"{arm} ")]
        assert row.endswith(f" {share:.0f} %  {verdict}")
        assert (row.count("9.99 GiB"), row.count("99.9 ms")) == (2, 3)


def test_a_run_of_8_gib_is_reported_on_80_columns(result):
    pages = {"candidate_pages": 2097152, "sent_pages": 262144, "zero_pages": 0, "skipped_pages": 1835008}
    pages |= {
        "payload_bytes": 1 << 30,
        "wire_bytes": 1 << 30,
        "dirtied_pages": 1310720,
        "duration_ms": 1234.5,
    }
    part = result.rounds[0].model_copy(update=pages)
    lines = lines_of(run_report(result.model_copy(update={"rounds": [part]})), 80)
    (row,) = [line for line in lines if "2,097,152" in line]
    assert row.split()[1:-4] == ["1.23", "s", "2,097,152", "262,144", "0", "1,835,008", "1,310,720"]
    assert row.endswith("1.00 GiB 1.00 GiB")


def test_variants_are_compared_on_80_columns(arms):
    summary = summarise([arms["none"], arms["zero"], arms["hint"]])
    lines = lines_of(compare_table({"skip none, streams 4": summary, "skip both, streams 4": summary}), 80)
    first = next(row for row, line in enumerate(lines) if line.startswith("skip none, streams 4 "))
    told = [lines[first + row] for row in range(3)]
    for line, figures in zip(told, ("864 MiB 900 ms", "240 MiB 400 ms", "960 MiB 1.00 s"), strict=True):
        wire, total = figures[:7], figures[8:]
        assert wire in line
        assert total in line


GIB_OF_PAGES = 1 << 18
HOST = {
    "host": "a", "guest": "running", "has_guest": True, "node_pid": 4194303, "node_alive": True,
    "agent_pid": 4194302, "agent_alive": True, "balloon_pages": 2559, "balloon_target_pages": 5119,
    "free_pages": GIB_OF_PAGES - 300, "held_pages": GIB_OF_PAGES - 300, "operations": 123_456_789,
}  # fmt: skip
STANDBY = HOST | {"host": "b", "guest": "standby", "has_guest": False}


def test_a_session_is_shown_on_80_columns():
    loss = {"id": 1, "kind": "partition", "host": "a", "parameters": {"direction": "both"}}
    status = {"session": "runs/x/1", "hosts": [HOST, STANDBY], "faults": [loss], "migrations": []}
    lines = lines_of(status_table(status), 80)
    assert "the guest is on host a" in lines
    (row,) = [line for line in lines if line.startswith("a ")]
    assert row.endswith("4194303  4194302  1.00 GiB  10.0 MiB of  1.00 GiB  123,456,789")
    assert any(line.split() == ["20.0", "MiB"] for line in lines), "the balloon's target"
    assert any("direction=both" in line for line in lines)


def test_a_session_whose_hosts_are_silent_claims_no_place_for_the_guest():
    silent = {**STANDBY, "guest": "unknown", "problem": "it does not answer"}
    text = rendered(status_table({"session": "s", "hosts": [silent], "faults": [], "migrations": []}), 80)
    assert "no host says that it has the guest" in text
    assert "b: it does not answer" in text


def test_doctor_shows_long_paths_whole():
    path = "/run/user/1000/" + "a-directory-with-a-long-name/" * 3 + "docker.sock"
    lacking = Checkup("Docker engine", ok=False, required=False, found=f"no engine at {path}",
                      needed_for="--hosts docker", remedy=f"look at {path}")  # fmt: skip
    assert len(lines_of(doctor_table([lacking]), 80)) > 2 * len(path) // 80


def test_an_estimate_and_what_was_measured_are_told_apart(result):
    estimated = result.model_copy(update={
        "downtime_ms_estimated": 24.6, "downtime_ms": 60.0,
        "downtime_parts_ms_estimated": {"pause": 2.0}, "downtime_parts_ms": {"pause": 5.0},
    })  # fmt: skip
    told = dict(course_lines(estimated))["estimate"]
    assert told == "24.6 ms of downtime (measured 60.0 ms); most apart: pause 2.00 ms (measured 5.00 ms)"


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
