"""What a soak draws, when it ends, and what it keeps; no process is started."""

import itertools
import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from testbed.checkers.verdict import Finding, Verdict
from testbed.cli import app
from testbed.crashes.cell import CellRun
from testbed.crashes.table import CELLS, cell_named
from testbed.experiments import soak as soaking
from testbed.experiments.soak import draw_one, matrix, of_cell, soak
from testbed.interrupt import Interrupt
from testbed.record.run_dir import create


@pytest.mark.parametrize("hosts", ["local", "docker"])
def test_every_run_that_is_drawn_is_possible_and_the_same_again(hosts):
    runs = [draw_one(5, number, hosts) for number in range(1, 200)]
    assert runs == [draw_one(5, number, hosts) for number in range(1, 200)]
    assert runs != [draw_one(6, number, hosts) for number in range(1, 200)]
    cells = [run for run in runs if run.cell is not None]
    scenarios = [run.scenario for run in runs if run.cell is None]
    assert len(cells) > 50
    assert len(scenarios) > 50
    assert {scenario.hosts.kind for scenario in scenarios} == {hosts}
    kinds = {fault.kind for scenario in scenarios for fault in scenario.fault}
    assert kinds == ({"pause"} if hosts == "local" else {"pause", *soaking.CONTAINER_FAULTS})
    assert not kinds & {"kill"}, "what a kill leads to is the table's, cell by cell"


def test_the_matrix_is_every_cell_once():
    assert [run.cell for run in matrix(1, "local")] == list(CELLS)


class Runs:
    """In place of the real cells: the third one fails, the fourth is where the user presses Ctrl-C."""

    def __init__(self, interrupt):
        self.interrupt = interrupt
        self.count = 0

    def __call__(self, cell, out, interrupt, *, seed, overrides):
        self.count += 1
        problems = ["owner: two"] if self.count == 3 else ["expectation: it was cancelled"]
        if self.count == 4:
            self.interrupt.press()
        run = SimpleNamespace(
            run_dir=create(out, "crash", seed), result=SimpleNamespace(outcome="failed"),
            judgement=SimpleNamespace(findings={}),
        )  # fmt: skip
        return CellRun(cell, run, problems if self.count >= 3 else [])


def soaked(tmp_path, monkeypatch, **options):
    interrupt = Interrupt()
    monkeypatch.setattr(soaking, "run_cell", Runs(interrupt))
    drawn = (of_cell(CELLS[0], number, number, "local") for number in itertools.count(1))
    told = []
    chosen = {"seed": 1, "minutes": None, "keep": False} | options
    return soak(drawn, tmp_path, interrupt, told.append, **chosen), told


def test_a_failing_run_is_kept_and_a_press_ends_it(tmp_path, monkeypatch):
    done, told = soaked(tmp_path, monkeypatch)
    assert [bool(line.problems) for line in told] == [False, False, True, False]
    assert [line.drawn.number for line in done.failing] == [3]
    assert [
        path.name.rpartition("-")[2] for path in (tmp_path / "crash").iterdir() if not path.is_symlink()
    ] == ["3"]
    assert done.to_dict()["failing"] == 1


def test_all_are_kept_where_that_is_wanted(tmp_path, monkeypatch):
    done, _ = soaked(tmp_path, monkeypatch, keep=True)
    assert all(line.run_dir for line in done.lines)


def test_no_time_is_no_run(tmp_path, monkeypatch):
    done, told = soaked(tmp_path, monkeypatch, minutes=0.0)
    assert (done.lines, told) == ([], [])


def test_the_command_line_refuses_what_it_cannot_do(tmp_path):
    for words, why in (
        (["--hosts", "moon"], "local or docker"),
        (["--cell", "commit/dest"], "there is no crash"),
        (["--matrix", "--only", "3", "--seed", "4"], "exclude each other"),
        (["--only", "3"], "say --seed too"),
    ):
        result = CliRunner().invoke(app, ["soak", *words, "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert why in result.output


def test_the_command_line_names_every_cell():
    result = CliRunner().invoke(app, ["soak", "--cell", "list"])
    assert result.exit_code == 0
    assert [line[:28].rstrip() for line in result.stdout.splitlines()] == [cell.name for cell in CELLS]


def test_the_command_line_tells_nothing_but_json_where_that_is_wanted(tmp_path):
    result = CliRunner().invoke(
        app, ["soak", "--minutes", "0", "--seed", "4", "--json", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["seed"] == 4


def test_a_cell_of_a_matrix_is_as_it_is_by_name():
    assert of_cell(cell_named("commit.sent/both"), 1, 2, "local").title == "crash commit.sent/both"


@pytest.mark.parametrize(
    ("outcome", "problems"),
    [
        ("completed", ["bytes: some came from elsewhere"]),
        ("failed", []),
        ("guest_lost", ["the outcome is guest_lost, and no fault kills a guest"]),
    ],
)
def test_a_run_that_completed_has_all_its_evidence_whatever_came_on_its_way(outcome, problems):
    findings = {
        "bytes": Finding(Verdict.UNKNOWN, ("some came from elsewhere",)),
        "expectation": Finding(Verdict.INVALID, ("another outcome",)),
    }
    reasons = [f"{name}: {reason}" for name, finding in findings.items() for reason in finding.reasons]
    judgement = SimpleNamespace(findings=findings, reasons=reasons)
    run = SimpleNamespace(result=SimpleNamespace(outcome=outcome), judgement=judgement)
    assert soaking.problems_of(run, faults=True) == problems
