"""The command line: exit codes, one-line errors, results on standard output and nothing else there."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.errors import MachineCannotError
from testbed.machine import capabilities
from testbed.machine.checkup import Checkup
from testbed.machine.doctor import examine, fit
from testbed.record.testing import SyntheticRun
from testbed.scenario.file import parse

runner = CliRunner()


def invoke(*arguments):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), "no traceback"
    return result


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text('[guest]\nmemory = "16MiB"\n')
    return path


@pytest.fixture
def nothing_starts(monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("a process was started")

    monkeypatch.setattr("testbed.hosts.process.subprocess.Popen", refuse)


def test_a_valid_record_is_0(tmp_path):
    result = invoke("check", SyntheticRun(tmp_path).run_dir.path)
    assert result.exit_code == 0
    assert "The run is valid." in result.stdout


@pytest.mark.parametrize(
    ("fault", "code", "word"),
    [
        ("owners_overlap", 1, "invalid"),
        ("write_lost_after_harvest", 1, "invalid"),
        ("wire_miscounted", 4, "unknown"),
    ],
)
def test_a_record_with_a_fault_is_1_and_one_that_cannot_be_judged_is_4(tmp_path, fault, code, word):
    result = invoke("check", "--json", SyntheticRun(tmp_path, fault=fault).run_dir.path)
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert document["verdict"] == word
    assert document["result"]["verdict"] == word
    assert document["reasons"]


def test_what_is_no_record_is_2(tmp_path):
    result = invoke("check", tmp_path)
    assert result.exit_code == 2
    assert "is no run directory" in result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("nothing_starts")
def test_an_invalid_scenario_is_2_with_every_problem_and_nothing_started(scenario, tmp_path):
    scenario.write_text('sed = 1\n[guest]\nmemory = "1MiB"\n[migration]\nskip = "all"\n')
    out = tmp_path / "runs"
    result = invoke("run", scenario, "--out", out)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"ballast: {scenario}: ") for line in lines)
    assert not out.exists()


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "missing.toml"),
        ("run",),
        ("run", "SCENARIO", "--set", "nonsense"),
        ("run", "SCENARIO", "--hosts", "pods"),
        ("run", "SCENARIO", "--seed", "-1"),
        ("demo", "--memory", "plenty"),
        ("demo", "--memory", "17MiB"),
        ("demo", "--memory", "8MiB"),
        ("compare", "SCENARIO", "--vary", "migration.skip"),
        ("compare", "SCENARIO", "--vary", "migration.skip=none,none"),
        ("compare", "SCENARIO", "--vary", "migration.skip=none,all"),
        ("compare", "SCENARIO", "--vary", "seed=" + ",".join(map(str, range(65)))),
        ("compare", "SCENARIO", "--vary", "migration.skip=none,hint", "--repeat", "0"),
        ("compare", "SCENARIO"),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_usage_is_2(scenario, tmp_path, arguments):
    words = [str(scenario) if word == "SCENARIO" else word for word in arguments]
    result = invoke(*words, *(["--out", tmp_path / "runs"] if len(words) > 1 else []))
    assert result.exit_code == 2
    assert result.stderr.strip()
    assert result.stdout == ""


@pytest.mark.usefixtures("nothing_starts")
def test_a_guest_larger_than_the_machine_is_3_and_leaves_nothing(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(capabilities, "probe_tracker", lambda: "")
    out = tmp_path / "runs"
    result = invoke("run", scenario, "--set", "guest.memory=1TiB", "--out", out)
    assert result.exit_code == 3
    assert "choose a smaller guest.memory" in result.stderr
    assert not out.exists()


@pytest.mark.usefixtures("nothing_starts")
def test_a_kernel_without_tracking_is_3_and_names_the_way_out(scenario, tmp_path, monkeypatch):
    monkeypatch.setattr(capabilities, "probe_tracker", lambda: "pagemap has no PAGEMAP_SCAN")
    result = invoke("run", scenario, "--out", tmp_path / "runs")
    assert result.exit_code == 3
    assert "pagemap has no PAGEMAP_SCAN" in result.stderr
    assert "migration.tracker = 'hash'" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_without_hints_a_kernel_without_tracking_will_do(monkeypatch):
    monkeypatch.setattr(capabilities, "probe_tracker", lambda: "no")
    text = '[guest]\nmemory = "16MiB"\n[migration]\nskip = "zero"\n'
    assert list(capabilities.lacks(parse(text, default_name="x"))) == []
    with pytest.raises(MachineCannotError):
        capabilities.require(parse(text, default_name="x", overrides=["migration.tracker=uffd"]))


def test_doctor_examines_this_machine():
    result = invoke("doctor", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["fit"] else 3)
    assert {check["name"] for check in document["checks"]} >= {
        "memfd",
        "userfaultfd WP_ASYNC",
        "Docker engine",
    }
    assert all(check["needed_for"] for check in document["checks"])


def test_doctor_says_what_a_lack_means(monkeypatch):
    monkeypatch.setattr(capabilities, "probe_tracker", lambda: "userfaultfd cannot be opened")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    # No reason is broken, however many there are for a person without root.
    monkeypatch.setenv("COLUMNS", "400")
    result = invoke("doctor")
    assert result.exit_code == 0, "hash tracking still works"
    assert "userfaultfd cannot be opened" in result.stdout
    assert "apt-get install docker.io" in " ".join(result.stdout.split())
    monkeypatch.setattr(capabilities, "probe_memfd", lambda: "memfd_create: not permitted")
    assert invoke("doctor").exit_code == 3


def test_only_what_is_required_makes_a_machine_unfit():
    lacking = Checkup("docker", ok=False, required=False, found="-", needed_for="containers")
    assert fit([lacking])
    assert not fit([lacking, Checkup("memfd", ok=False, required=True, found="-", needed_for="memory")])
    checkups = examine()
    assert len({checkup.name for checkup in checkups}) == len(checkups) >= 11


def test_help_names_every_command_and_is_quick_to_import():
    heavy = (
        "import sys; import testbed.cli; print([m for m in ('numpy', 'grpc', 'docker') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("demo", "run", "compare", "dirtyrate", "check", "doctor", "clean"):
        assert command in result.stdout


def test_help_lists_faults_beside_migrations():
    listed = [line.split()[0] for line in invoke("--help").stdout.splitlines() if line.startswith("  ")]
    assert listed[listed.index("up") :][:4] == ["up", "migrate", "fault", "status"]


def test_the_version_is_the_packages():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"ballast {version('ballast')}\n")


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("kv-only", "scenarios/kv-only.toml"),
        ("kv-olny.toml", "scenarios/kv-only.toml"),
        ("elsewhere/kv-only", "scenarios/kv-only.toml"),
        ("mine", "mine.toml"),
        ("scenarios/idle", "scenarios/idle.toml"),
        ("something-else", None),
    ],
)
def test_a_scenario_that_is_not_there_is_told_which_one_may_be_meant(tmp_path, monkeypatch, typed, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenarios").mkdir()
    for name in ("scenarios/kv-only.toml", "scenarios/idle.toml", "mine.toml"):
        (tmp_path / name).touch()
    result = invoke("run", typed)
    hint = f"; did you mean '{meant}'?" if meant else ""
    assert result.exit_code == 2
    assert result.stderr == (f"ballast: {typed}: cannot read the scenario: No such file or directory{hint}\n")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "give a SCENARIO.toml"),
        (("scenarios/idle.toml", "--session", "runs"), "measure one or the other"),
        (("--session", "runs", "--seed", "3"), "give a SCENARIO.toml"),
        (("scenarios/idle.toml", "--period", "soon"), "--period"),
        (("scenarios/idle.toml", "--rate", "fast"), "--rate"),
    ],
)
def test_a_dirty_rate_is_of_a_scenario_or_of_a_session(words, complaint):
    result = invoke("dirtyrate", *words)
    assert result.exit_code == 2
    assert complaint in result.stderr
