"""Mishaps of a run: a destination that is away, full or dies, and Ctrl-C at every step.

Each time: one line says why, the exit code is 1, the guest is whole at the source and has its pages back, and
nothing is left behind (runs.perform looks).
"""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from testbed.record.run_record import load
from tests.live.liars import LIES, grpc_liar, tcp_liar
from tests.live.runs import (
    TINY,
    WRITER,
    ends,
    guest_is_whole,
    hinted,
    is_one_line,
    misbehave,
    perform,
    scenario,
    send_elsewhere,
)

pytestmark = pytest.mark.live

AT_ONCE = "migration.link_timeout=0s"  # a lost connection ends the attempt
# The last round is sent while the guest stands still, and takes its time.
LONG_STOP = ("migration.rounds_max=1", "migration.bandwidth=16MiB/s")


def assert_not_handed_over(run, outcome="failed"):
    """What a user sees, and where the guest is; returns the record."""
    assert run.result.outcome == outcome, run.result.outcome_reason
    assert is_one_line(run.result.outcome_reason), run.result.outcome_reason
    assert run.exit_code == 1
    assert ends(run.judgement.reasons, "expectation"), run.judgement.reasons
    return guest_is_whole(run, "source")


class Pids(dict):
    """Process ids of a run by name, from its events."""

    def note(self, event):
        if event.name == "process_started":
            self[event.fields["process"]] = event.fields["pid"]

    def kill(self, victim):
        os.kill(self[victim], signal.SIGKILL)


def at(name, origin, action, **fields):
    """A watcher that does `action` at the first such event."""
    done = []

    def watch(event):
        matches = event.name == name and event.origin == origin and fields.items() <= event.fields.items()
        if matches and not done:
            done.append(event)
            action()

    return watch


# -- the destination --------------------------------------------------------------------------------


def test_a_destination_that_is_gone_when_the_migration_begins(tmp_path):
    pids = Pids()

    def strike():
        pids.kill("dest-node")
        moment = threading.Event()
        while psutil.pid_exists(pids["dest-node"]):
            moment.wait(0.005)  # whoever speaks to it next speaks to nobody

    blow = at("guest_status", "testbed", strike)

    def watch(event):
        pids.note(event)
        blow(event)

    run = perform(tmp_path, scenario(), watch)
    record = assert_not_handed_over(run)
    assert "unavailable" in run.result.outcome_reason
    assert not list(record.all("round_started"))


def test_a_destination_that_hangs_is_given_up_at_the_timeout(tmp_path):
    """It wakes up when it is too late: what it was asked then must not be an attempt any more."""
    pids = Pids()
    freeze = at("migration_requested", "testbed", lambda: os.kill(pids["dest-node"], signal.SIGSTOP))
    wake = threading.Timer(1.5, lambda: os.kill(pids["dest-node"], signal.SIGCONT))

    def watch(event):
        pids.note(event)
        freeze(event)
        if event.name == "migration_requested":
            wake.start()

    run = perform(tmp_path, scenario("migration.timeout=300ms"), watch)
    wake.join()
    record = assert_not_handed_over(run, "cancelled")
    assert "timeout" in run.result.outcome_reason
    assert not len(record.beats["dest"])


def test_a_destination_without_room(tmp_path):
    run = perform(tmp_path, scenario("hosts.guest_memory_max=32MiB"))
    assert_not_handed_over(run)
    assert "holds guests of at most 33554432 bytes" in run.result.outcome_reason


MOMENTS = {
    "in mid-stream": ("progress", "source", ("migration.bandwidth=16MiB/s", "migration.rounds_max=1"), ()),
    "while the guest stands still": ("guest_paused", "source", LONG_STOP, ()),
    "while it verifies the image": ("held", "dest", (), ("b:host.holds_prepare",)),
}


@pytest.mark.parametrize("victim", ["dest-node", "dest-agent"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_destination_that_is_killed(tmp_path, monkeypatch, moment, victim):
    name, origin, overrides, wishes = MOMENTS[moment]
    go = tmp_path / "go"
    misbehave(monkeypatch, *wishes)
    monkeypatch.setenv("BALLAST_MISCHIEF_GO", str(go))
    pids = Pids()

    def strike():
        pids.kill(victim)
        go.touch()

    blow = at(name, origin, strike)

    def watch(event):
        pids.note(event)
        blow(event)

    run = perform(tmp_path, scenario(AT_ONCE, *overrides, text=WRITER), watch)
    record = assert_not_handed_over(run)
    assert hinted(record) > 0, "the guest had given its pages away for a while"
    assert not len(record.beats["dest"])


def test_a_destination_that_is_no_migration_service_fails_the_run(tmp_path, monkeypatch):
    with grpc_liar(LIES["open is garbage"]) as address:
        send_elsewhere(monkeypatch, address)
        run = perform(tmp_path, scenario())
    assert_not_handed_over(run)


def test_a_destination_that_is_no_grpc_server_fails_the_run(tmp_path, monkeypatch):
    with tcp_liar(b"220 mail.example ESMTP\r\n") as address:
        send_elsewhere(monkeypatch, address)
        run = perform(tmp_path, scenario())
    assert_not_handed_over(run)


# -- Ctrl-C -------------------------------------------------------------------------------------------


def press():
    """A real SIGINT to this very process, where the run's handlers are."""
    os.kill(os.getpid(), signal.SIGINT)


def assert_cancelled(run, *phases):
    record = assert_not_handed_over(run, "cancelled")
    assert run.result.outcome_reason == "interrupted by the user"
    asked = record.last("cancel_asked")
    assert asked is not None
    assert asked.fields["effective"]
    assert asked.fields["phase"] in phases
    return record


@pytest.mark.parametrize(
    ("name", "origin", "overrides"),
    [
        ("process_started", "testbed", ()),
        ("guest_attached", "source", ()),
        ("guest_ready", "source", ("run.settle=30s",)),
    ],
    ids=["starting", "booting", "settling"],
)
def test_ctrl_c_before_the_migration_takes_everything_down(tmp_path, name, origin, overrides):
    run = perform(tmp_path, scenario(*overrides), at(name, origin, press))
    assert run.exit_code == 1
    assert run.result.outcome == "cancelled"
    assert is_one_line(run.result.outcome_reason)
    assert "interrupted" in run.result.outcome_reason
    assert load(run.run_dir.path).last("migration_requested") is None


def test_ctrl_c_while_the_guest_hints(tmp_path, monkeypatch):
    misbehave(monkeypatch, "guest.ends_its_report_at_done")
    run = perform(
        tmp_path, scenario("migration.hint_wait=30s", text=WRITER), at("hints_opened", "source", press)
    )
    assert_cancelled(run, "HINTING")


def test_ctrl_c_in_the_first_round(tmp_path):
    chosen = scenario("migration.bandwidth=4MiB/s")
    run = perform(tmp_path, chosen, at("progress", "source", press))
    record = assert_cancelled(run, "SENDING", "DRAINING")
    assert hinted(record) > 0


def test_ctrl_c_while_the_guest_stands_still(tmp_path):
    run = perform(tmp_path, scenario(*LONG_STOP, text=WRITER), at("guest_paused", "source", press))
    record = assert_cancelled(run, "FINAL_HARVESTING", "FINAL_SENDING", "FINAL_DRAINING")
    assert hinted(record) > 0
    assert record.last("guest_paused") is not None


@pytest.fixture
def held(tmp_path, monkeypatch):
    """A run whose destination waits in a step until the interruption was heard."""

    def run(mischief):
        go = Path(tmp_path / "go")
        misbehave(monkeypatch, f"b:host.{mischief}")
        monkeypatch.setenv("BALLAST_MISCHIEF_GO", str(go))
        pressing = at("held", "dest", press)
        releasing = at("cancel_asked", "testbed", go.touch)

        def watch(event):
            pressing(event)
            releasing(event)

        return perform(tmp_path, scenario(text=TINY), watch)

    return run


def test_ctrl_c_while_the_destination_prepares(held):
    run = held("holds_prepare")
    record = assert_cancelled(run, "PREPARING")
    assert not len(record.beats["dest"])


def test_ctrl_c_after_committing_changes_nothing(held):
    run = held("holds_commit")
    assert run.judgement.reasons == []
    assert (run.result.outcome, run.exit_code) == ("completed", 0)
    record = guest_is_whole(run, "dest")
    asked = record.last("cancel_asked")
    assert asked is not None
    assert (asked.fields["effective"], asked.fields["phase"]) == (False, "COMMITTING")


def test_ctrl_c_twice_waits_for_nothing_and_still_takes_everything_down(tmp_path):
    second = at("cancel_asked", "testbed", press)
    first = at("progress", "source", press)

    def watch(event):
        second(event)
        first(event)

    run = perform(tmp_path, scenario("migration.bandwidth=4MiB/s"), watch)
    assert run.exit_code == 1
    assert is_one_line(run.result.outcome_reason)
