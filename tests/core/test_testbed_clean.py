"""`ballast clean` removes what dead runs left behind, and only that."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.errors import MachineCannotError
from testbed.hosts import runtime_dir
from testbed.hosts.clean import LeftProcess, find, remove
from testbed.hosts.local import RUN_LABEL, RUNTIME_LABEL
from testbed.hosts.runtime_dir import RuntimeDir


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A place for runtime directories that no real run uses."""
    chosen = tmp_path / "run"
    chosen.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(chosen))
    monkeypatch.setattr(runtime_dir, "FALLBACK", chosen)
    # pytest's directories are deep; only the length of real places matters to sockets.
    monkeypatch.setattr(runtime_dir, "SOCKET_PATH_BYTES_MAX", 400)
    return chosen


def dead(place, run):
    """What a killed run leaves: its directory with a lock that nobody holds."""
    path = place / f"ballast-{run}"
    path.mkdir()
    (path / runtime_dir.LOCK_NAME).touch()
    (path / "a.control").touch()
    return path


@pytest.fixture
def start(tmp_path):
    """Starts long-lived processes whose command line is that of a node, with labels of our choice."""
    package = tmp_path / "stand_in"
    for module in ("host", "other"):
        (package / module).mkdir(parents=True)
        (package / module / "__init__.py").touch()  # a regular package: found before any other of its name
        (package / module / "__main__.py").write_text("print('up', flush=True)\ninput()\n")
    started = []

    def run(module, labels):
        process = subprocess.Popen(
            # Outside the virtual environment, where `host` is the stand-in and not the installed one.
            [sys._base_executable, "-m", module, "--name", "a"],
            cwd=package, env={**os.environ, **labels},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def labels(run, path):
    return {RUN_LABEL: run, RUNTIME_LABEL: str(path)}


def pids(found):
    return {left.pid for left in found if isinstance(left, LeftProcess)}


def test_a_dead_run_s_directory_goes_and_a_live_one_s_stays(place):
    gone, alive = dead(place, "aaaaaaaa"), RuntimeDir("bbbbbbbb")
    foreign = place / "ballast-not-ours"
    foreign.mkdir()
    assert [str(left) for left in find()] == [f"directory {gone}"]
    assert [remove(left) for left in find()] == [True]
    assert not gone.exists()
    assert alive.path.exists()
    assert foreign.exists()
    alive.remove()
    assert find() == []


def test_a_dead_run_s_process_is_killed_and_no_other(place, start):
    dead(place, "aaaaaaaa")
    alive = RuntimeDir("bbbbbbbb")
    left = start("host", labels("aaaaaaaa", place / "ballast-aaaaaaaa"))
    orphan = start("host", labels("cccccccc", place / "ballast-cccccccc"))
    of_live_run = start("host", labels("bbbbbbbb", alive.path))
    unlabelled = start("host", {})
    not_a_node = start("other", labels("aaaaaaaa", place / "ballast-aaaaaaaa"))
    mislabelled = start("host", labels("aaaaaaaa", place / "somewhere-else"))
    found = find()
    assert pids(found) == {left.pid, orphan.pid}
    assert all(remove(one) for one in found)
    assert left.wait(10) == -9
    assert orphan.wait(10) == -9
    assert [process.poll() for process in (of_live_run, unlabelled, not_a_node, mislabelled)] == [None] * 4
    alive.remove()


def test_what_ended_in_the_meantime_is_not_removed_twice(place, start):
    path = dead(place, "aaaaaaaa")
    process = start("host", labels("aaaaaaaa", path))
    (left_process, left_directory) = find()
    process.kill()
    process.wait()
    assert not remove(left_process)
    assert remove(left_directory)
    assert not remove(left_directory)


def test_the_command_tells_what_it_removed_and_a_dry_run_removes_nothing(place):
    path = dead(place, "aaaaaaaa")
    runner = CliRunner()
    told = runner.invoke(app, ["clean", "--dry-run"])
    assert (told.exit_code, told.stdout) == (0, f"would remove directory {path}\n")
    assert path.exists()
    told = runner.invoke(app, ["clean", "--json"])
    assert json.loads(told.stdout)["removed"] == [f"directory {path}"]
    assert not path.exists()
    assert runner.invoke(app, ["clean"]).stdout == "nothing was left behind\n"


@pytest.mark.usefixtures("place")
def test_two_runs_never_share_a_runtime_directory():
    first = RuntimeDir("aaaaaaaa")
    assert first.path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(MachineCannotError):
        RuntimeDir("aaaaaaaa")
    first.remove()


def test_a_place_whose_paths_would_be_too_long_for_sockets_is_not_used(tmp_path, monkeypatch):
    long_place = tmp_path / ("x" * 100)
    long_place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long_place))
    assert runtime_dir.base() == runtime_dir.FALLBACK
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert runtime_dir.base() == runtime_dir.FALLBACK
