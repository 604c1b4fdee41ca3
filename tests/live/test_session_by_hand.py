"""Standing sessions with real processes: up, status, migrate, fault, migrate back, down; what a crash leaves."""

import json
import signal
from pathlib import Path

import psutil
import pytest

from testbed.record.run_record import load
from tests.live.commands import Commands
from tests.live.runs import nothing_is_left_of, waited_for

pytestmark = pytest.mark.live


@pytest.fixture
def ballast(tmp_path):
    return Commands(tmp_path)


def guest_is_on(status):
    return [host["host"] for host in status["hosts"] if host["has_guest"]]


def test_a_session_from_up_to_down(ballast):
    session = ballast.up()
    mine = ("--session", str(session))
    status = ballast.json("status", *mine)
    assert guest_is_on(status) == ["a"]
    assert {host["host"]: host["guest"] for host in status["hosts"]} == {"a": "running", "b": "standby"}

    # Mistakes change nothing and are one line each.
    for words, code in (
        (("fault", "add", "loss", "share=1%"), 3),  # local hosts have no network of their own
        (("fault", "heal", "7"), 2),
    ):
        (complaint,) = ballast.run(*words, *mine, code=code)[1]
        assert complaint.startswith("ballast: ")

    there = ballast.json("migrate", *mine, "--set", "migration.skip=zero")
    assert (there["outcome"], there["result"]["verdict"]) == ("completed", "valid")
    assert there["result"]["account"]["problems"] == []

    rate = ballast.json("dirtyrate", *mine, "--periods", "2", "--period", "20ms")
    assert rate["run_dir"] == str(session)
    assert set(rate["predictions"]) == {"none", "zero", "hint", "both"}

    added = ballast.json("fault", "add", "pause", "host=b", "what=guest_agent", *mine)
    assert [fault["kind"] for fault in ballast.json("fault", "list", *mine)["faults"]] == ["pause"]
    agent = next(host["agent_pid"] for host in status["hosts"] if host["host"] == "b")
    assert psutil.Process(agent).status() == psutil.STATUS_STOPPED
    ballast.run("fault", "heal", str(added["fault"]["id"]), *mine)
    assert psutil.Process(agent).status() != psutil.STATUS_STOPPED

    back = ballast.json("migrate", "--to", "a", *mine)
    assert (back["leg"], back["result"]["verdict"]) == (2, "valid")
    seen = ballast.json("status", *mine)
    assert guest_is_on(seen) == ["a"]
    assert [one["outcome"] for one in seen["migrations"]] == ["completed", "completed"]

    down = ballast.json("down", *mine)
    assert (down["exit_code"], down["result"]["verdict"], len(down["result"]["legs"])) == (0, "valid", 2)
    record = load(session)
    assert [event.fields["kind"] for event in record.all("fault_healed")] == ["pause"]
    nothing_is_left_of(record.run_dir)
    ballast.run("check", str(session))
    (complaint,) = ballast.run("down", *mine, code=2)[1]
    assert "has ended" in complaint


def test_two_sessions_stand_beside_each_other_and_one_that_dies_is_cleaned_up(ballast):
    older, newer = ballast.up(), ballast.up()
    assert Path(ballast.json("status")["session"]) == newer, "the newest unless said"
    manifest = json.loads((older / "manifest.json").read_text())
    keeper = next(
        process for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:3] == ["-m", "testbed.standing.keeper"]
        and any(str(older) in str(file.path) for file in process.open_files())
    )  # fmt: skip
    keeper.kill()
    keeper.wait(10)
    (complaint,) = ballast.run("status", "--session", str(older), code=2)[1]
    assert "has died" in complaint
    assert "ballast clean" in complaint
    assert manifest["run"] in ballast.run("clean")[0]
    assert Path(ballast.json("status")["session"]) == newer, "clean touches nobody who lives"
    out, _ = ballast.run("down", "--session", str(newer))
    assert "nothing to judge" in out
    nothing_is_left_of(load(newer).run_dir)


def test_ctrl_c_while_it_starts_leaves_nothing(ballast):
    process = ballast.start("up", str(ballast.scenario))
    waited_for(lambda: list(ballast.place.glob("runs/*/2*/logs/*-node.log")), "the hosts to be started")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1
    (run_dir,) = ballast.place.glob("runs/*/2*")
    nothing_is_left_of(load(run_dir).run_dir)
