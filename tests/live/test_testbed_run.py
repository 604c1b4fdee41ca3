"""Runs with real processes: they end as they should, whatever happens, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from testbed.hosts.clean import find, remove
from testbed.interrupt import Interrupt
from testbed.record.run_dir import RunDir
from testbed.record.run_record import load
from testbed.run.runner import run_scenario
from tests.live.runs import TINY, nothing_is_left_of, scenario

pytestmark = pytest.mark.live

SLOW = ["migration.skip=none", "migration.bandwidth=16MiB/s"]  # about four seconds: time to interfere
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path):
    """Of this test's runs: others may run on this machine at the same time."""
    yield
    for manifest in tmp_path.rglob("manifest.json"):
        nothing_is_left_of(RunDir(manifest.parent))


@pytest.mark.parametrize("skip", ["none", "both"])
def test_a_guest_is_handed_over_and_proved_whole(tmp_path, skip):
    with Interrupt() as interrupt:
        run = run_scenario(scenario(f"migration.skip={skip}"), tmp_path, interrupt, lambda _: None)
    assert run.judgement.reasons == []
    assert run.exit_code == 0
    result = run.result
    assert result.outcome == "completed"
    assert result.integrity.compared_pages == 16384
    assert result.guest_blackout_ms is not None
    assert result.guest_blackout_ms > 0
    assert result.bytes.wire_tx > result.bytes.payload > 0
    assert bool(result.hints.skipped_pages) is (skip == "both")
    assert result.cpu_seconds.source > 0
    assert result.own_memory.dest_own_peak_bytes > 0
    assert json.loads(run.run_dir.result.read_text()) == result.to_dict()


def test_the_hash_tracker_is_used_when_asked_for(tmp_path):
    chosen = scenario("migration.skip=zero", "migration.tracker=hash")
    with Interrupt() as interrupt:
        run = run_scenario(chosen, tmp_path, interrupt, lambda _: None)
    assert run.judgement.reasons == []
    assert run.result.engine["tracker"] == "hash"


def test_a_ballooned_guest_migrates(tmp_path):
    chosen = scenario("balloon.num_pages=8MiB")
    with Interrupt() as interrupt:
        run = run_scenario(chosen, tmp_path, interrupt, lambda _: None)
    assert run.judgement.reasons == []
    assert run.result.guest.ballooned_pages_at_start == 2048


def killing(victim):
    """A watcher that kills a process of the run in the middle of the first round."""
    pids = {}

    def watch(event):
        if event.name == "process_started":
            pids[event.fields["process"]] = event.fields["pid"]
        if event.name == "progress" and victim in pids:
            os.kill(pids.pop(victim), signal.SIGKILL)

    return watch


@pytest.mark.parametrize("victim", ["dest-node", "dest-agent"])
def test_a_destination_that_dies_leaves_the_guest_at_the_source(tmp_path, victim):
    chosen = scenario(*SLOW, "migration.link_timeout=0s").model_copy(update={"expect": "failed"})
    with Interrupt() as interrupt:
        run = run_scenario(chosen, tmp_path, interrupt, killing(victim))
    assert run.judgement.reasons == []
    assert run.result.outcome == "failed"
    assert run.result.outcome_reason
    checked = load(run.run_dir.path).last("guest_checked")
    assert checked is not None
    assert checked.fields["host"] == "source"
    assert checked.fields["ok"]


@pytest.mark.parametrize("victim", ["source-node", "source-agent"])
def test_a_source_that_dies_ends_the_run_with_a_reason(tmp_path, victim):
    with Interrupt() as interrupt:
        run = run_scenario(scenario(*SLOW), tmp_path, interrupt, killing(victim))
    assert run.exit_code == 1
    assert run.result.outcome in ("failed", "guest_lost")
    assert run.result.outcome_reason


def ballast(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", "from testbed.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.fixture
def slow_file(tmp_path):
    path = tmp_path / "slow.toml"
    path.write_text(TINY.replace("[migration]", '[migration]\nskip = "none"\nbandwidth = "16MiB/s"'))
    return path


def wait_for_line(process, wanted):
    """Reads progress until the event, and goes on reading in the caller's communicate()."""
    for line in process.stderr:
        if json.loads(line).get("name") == wanted:
            return
    raise AssertionError(f"{wanted} never came")


def test_ctrl_c_cancels_checks_the_guest_and_takes_everything_down(slow_file, tmp_path):
    with ballast("run", slow_file, "--json", "--out", tmp_path / "runs") as process:
        wait_for_line(process, "progress")
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    result = json.loads(output)
    assert result["outcome"] == "cancelled"
    assert [reason.split(":")[0] for reason in result["reasons"]] == ["expectation"], (
        "the guest itself is whole"
    )
    checked = load(Path(result["run_dir"])).last("guest_checked")
    assert checked is not None
    assert checked.fields["ok"]
    assert checked.fields["host"] == "source"


def test_a_killed_testbed_takes_its_processes_along_and_clean_removes_the_rest(slow_file, tmp_path):
    with ballast("run", slow_file, "--out", tmp_path / "runs") as process:
        wait_for_line(process, "progress")
        mine = {child.pid for child in psutil.Process(process.pid).children()}
        assert len(mine) == 4
        process.kill()
        process.communicate(timeout=DEADLINE_S)
    deadline = time.monotonic() + DEADLINE_S
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in mine):
        assert time.monotonic() < deadline, "the kernel was asked to end them with their starter"
        os.sched_yield()
    (manifest,) = (tmp_path / "runs").glob("*/2*/manifest.json")
    run = json.loads(manifest.read_text())["run"]
    left = [one for one in find() if run in str(one)]
    assert len(left) == 1, "only the runtime directory"
    assert all(remove(one) for one in left)


def test_a_record_is_judged_again_with_the_same_verdict(tmp_path):
    with Interrupt() as interrupt:
        run = run_scenario(scenario(), tmp_path, interrupt, lambda _: None)
    with ballast("check", run.run_dir.path, "--json") as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == run.exit_code
    again = json.loads(output)
    assert again["result"] == run.result.to_dict()
