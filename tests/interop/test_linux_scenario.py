"""`guest.kind = "linux"`: a real kernel as the source of a migration, from the command line to the verdict."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import xxhash

from linux_guest import probe
from linux_guest.frame_table import FREE, HELD, USED
from linux_guest.freezer import FreezerGroup, _places, groups_named
from linux_guest.ram_file import RamFile
from linux_guest.uml import LinuxGuest
from testbed.checkers import judge
from testbed.checkers.verdict import Verdict
from testbed.record.run_record import load
from tests.interop.stock_guest import PAGE_BYTES, needs_linux, wait_until

NO_FREEZER = probe.freezing()
pytestmark = [*needs_linux, pytest.mark.skipif(bool(NO_FREEZER), reason=NO_FREEZER or "nothing is missing")]

SCENARIO = Path(__file__).parents[2] / "scenarios" / "linux.toml"


def ballast(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", "from testbed.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def nothing_is_left(run):
    assert not groups_named(f"ballast-{run}-*")
    labelled = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("BALLAST_RUN") == run:
                labelled.append(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    assert not labelled


@pytest.fixture(name="run", scope="module")
def fixture_run(tmp_path_factory):
    """The scenario that ships, run once: (result document, run directory)."""
    with ballast("run", str(SCENARIO), "--json", "--out", str(tmp_path_factory.mktemp("runs"))) as command:
        told, complaints = command.communicate(timeout=100)
    assert command.returncode == 0, complaints[-2000:]
    result = json.loads(told)
    return result, Path(result["run_dir"])


def test_the_scenario_that_ships_is_a_valid_rehearsal(run):
    result, path = run
    assert (result["outcome"], result["verdict"]) == ("rehearsal", "valid")
    assert result["engine"]["tracker"] == "hash"
    assert result["integrity"]["compared_pages"] == result["guest"]["pages"]
    assert result["integrity"]["mismatches"] == 0
    assert result["integrity"]["skipped_pages_proved_free"] == result["hints"]["skipped_pages"] > 0
    assert result["guest_blackout_ms"] > result["downtime_ms"] > 0
    nothing_is_left(load(path).manifest["run"])


def test_what_was_skipped_was_held_by_the_kernels_own_driver_at_the_freeze(run):
    _, path = run
    record = load(path)
    skipped = record.u8("sent") == 0
    kinds = record.u8("frames")
    assert np.isin(kinds[skipped], (FREE, HELD)).all()
    assert (kinds[skipped] == HELD).mean() > 0.9, "DONE came after the freeze"
    assert (kinds == USED).any()


def test_no_page_of_the_living_marker_was_skipped_and_pages_of_the_ended_one_were(run):
    _, path = run
    figures = judge(load(path)).findings["marker"].figures
    assert figures["alive_pages"] == (8 << 20) // PAGE_BYTES
    assert figures["ended_skipped_pages"] > 0


@pytest.mark.parametrize("fault", ["living page skipped", "page differs at the destination", "content lost"])
def test_the_judgement_of_this_very_run_turns_when_one_page_is_wrong(run, tmp_path, fault):
    _, path = run
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    markers_path = copy / "artefacts" / "markers.json"
    markers = json.loads(markers_path.read_text())
    living = next(marker for marker in markers if marker["alive"])
    pfn = living["pfns"][7]
    if fault == "living page skipped":
        change(copy / "artefacts" / "sent", np.uint8, pfn, 0)
    elif fault == "page differs at the destination":
        change(copy / "artefacts" / "dest_hashes", np.uint64, pfn, 4711)
    else:
        living["lost_pages"] = 1
        markers_path.write_text(json.dumps(markers))
    assert judge(load(path)).verdict is Verdict.VALID
    assert judge(load(copy)).verdict is Verdict.INVALID


def change(path, dtype, index, value):
    array = np.fromfile(path, dtype)
    array[index] = value
    array.tofile(path)


def test_an_agent_that_is_killed_takes_its_guest_along(tmp_path):
    settling = ("--set", "run.settle=60s")
    with ballast("run", str(SCENARIO), "--json", "--out", str(tmp_path), *settling) as command:
        try:
            wait_until(lambda: events(tmp_path, "guest_ready"), "the guest is up", 60)
            (agent,) = [
                event["fields"]["pid"]
                for event in events(tmp_path, "process_started")
                if event["fields"]["process"] == "source-agent"
            ]
            os.kill(agent, signal.SIGKILL)
            command.send_signal(signal.SIGINT)  # it settles for a minute otherwise
            command.communicate(timeout=60)
        finally:
            command.kill()
    assert command.returncode != 0
    (started,) = events(tmp_path, "run_started")
    nothing_is_left(started["fields"]["run"])


def events(root, name):
    lines = [line for path in root.rglob("events.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if f'"name": "{name}"' in line]


@pytest.mark.parametrize("switch", sorted({kind.switch for _, kind in _places()}))
def test_a_frozen_guest_changes_nothing_and_goes_on_afterwards(tmp_path, switch):
    """Busy with its processor, with new processes and with memory: every freeze must be complete."""
    place = next(place for place, kind in _places() if kind.switch == switch)
    kind = next(kind for _, kind in _places() if kind.switch == switch)
    group = FreezerGroup(place / f"ballast-test-{os.getpid()}", kind)
    group.make()
    try:
        with LinuxGuest(tmp_path, memory_bytes=128 << 20, group=group) as linux:
            ram = RamFile(linux.open_ram())
            linux.sh("(while :; do x=$((x+1)); done) & echo")
            linux.sh("(while :; do ls / >/dev/null; done) & echo")
            linux.sh("(while :; do dd if=/dev/urandom of=/tmp/w bs=64k count=64 2>/dev/null; done) & echo")
            for _ in range(8):
                group.freeze()
                first = digest(ram)
                threading.Event().wait(0.02)
                assert digest(ram) == first, "something ran on"
                group.thaw()
                wait_until(lambda first=first: digest(ram) != first, "the guest goes on")
            ram.close()
    finally:
        group.remove()


def digest(ram):
    state = xxhash.xxh3_64()
    for offset in range(0, ram.size, 1 << 20):
        state.update(ram.read(offset, 1 << 20))
    return state.intdigest()


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_nothing_of_a_guest_outlives_its_starter(tmp_path, frozen):
    """Programs of a User-Mode Linux guest whose kernel died would go on as programs of this machine."""
    program = (
        "import sys, time; from pathlib import Path; from linux_guest.uml import LinuxGuest\n"
        "from linux_guest.freezer import make_group\n"
        "directory = Path(sys.argv[1]); group = make_group(f'ballast-test-{sys.argv[2]}')\n"
        "guest = LinuxGuest(directory, memory_bytes=128 << 20, group=group); guest.start(); guest.wait_until_up()\n"
        "guest.sh('(while :; do :; done) & echo')\n"
        "if sys.argv[3] == 'True': group.freeze()\n"
        "print('up', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(os.getpid()), str(frozen)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout.readline() == "up\n"
        (group,) = groups_named(f"ballast-test-{os.getpid()}")
        try:
            assert len(group.members()) > 3
            starter.kill()
            wait_until(lambda: not group.members(), "all of it ends", 5)
        finally:
            starter.kill()
            group.end()
