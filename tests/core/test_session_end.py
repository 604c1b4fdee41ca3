"""The end of a session by hand: a guest that was not asked, or was left standing, never passes for valid."""

import re
from types import SimpleNamespace

import pytest

from testbed.checkers import session_end
from testbed.checkers.verdict import Verdict
from testbed.errors import RunBrokenError
from testbed.history import Event, History
from testbed.record.run_dir import RunDir
from testbed.record.run_record import RunRecord
from testbed.run.session import Session
from testbed.scenario.file import parse

WELL = {"ok": True, "problems": [], "checked_items": 9, "expected_items": 9}
LEG = [("leg_started", {"leg": 1}), ("guest_checked", {"host": "dest", **WELL}),
       ("leg_ended", {"leg": 1, "outcome": "completed"})]  # fmt: skip
RESUMED = ("guest_resumed", {"host": "dest"})
ENDS = ("session_ends", {"host": "dest"})
ASKED = ("guest_checked", {"host": "dest", **WELL})
UNASKED = ("guest_unchecked", {"host": "dest", "reason": "the agent is gone"})


def record(tmp_path, *told):
    events = tuple(
        Event(at_ns, "testbed", name, fields)
        for at_ns, (name, fields) in enumerate([("session_stands", {}), *told], 1)
    )
    scenario = parse('[guest]\nmemory = "64MiB"\n', default_name="by-hand")
    return RunRecord(RunDir(tmp_path), {}, scenario, events)


def test_a_session_whose_guest_runs_on_and_answers_at_the_end_is_valid(tmp_path):
    assert session_end.check(record(tmp_path, *LEG, RESUMED, ENDS, ASKED)).verdict is Verdict.VALID
    assert session_end.check(record(tmp_path, ENDS, ASKED)).verdict is Verdict.VALID


@pytest.mark.parametrize(
    ("told", "verdict", "words"),
    [
        ([*LEG, RESUMED, ENDS, UNASKED], Verdict.UNKNOWN, "could not be asked .*: the agent is gone"),
        ([ENDS, UNASKED], Verdict.UNKNOWN, "could not be asked"),
        ([*LEG, RESUMED, ENDS], Verdict.UNKNOWN, "could not be asked"),
        ([*LEG, RESUMED], Verdict.UNKNOWN, "still stands"),
        ([*LEG, RESUMED, ("run_ended", {})], Verdict.UNKNOWN, "without `ballast down`"),
        ([*LEG, RESUMED, ENDS, ("guest_checked", {"host": "source", **WELL})], Verdict.UNKNOWN, "was asked"),
        ([*LEG, RESUMED, ENDS, ("guest_checked", {"host": "dest", **WELL, "checked_items": 3})],
         Verdict.UNKNOWN, "3 of 9"),
        ([*LEG, RESUMED, ENDS, ("guest_checked", {"host": "dest", **WELL, "problems": ["lost"]})],
         Verdict.INVALID, "lost"),
        ([*LEG, ("cannot_go_on", {"reason": "no answer"}), ENDS, ASKED],
         Verdict.UNKNOWN, "after leg 1 the guest was not let run on: no answer"),
        ([*LEG, *LEG, RESUMED, ENDS, ASKED], Verdict.UNKNOWN, "after leg 1 the guest was not let run on"),
    ],
)  # fmt: skip
def test_a_guest_that_was_not_asked_or_stood_still_speaks_against_the_session(tmp_path, told, verdict, words):
    finding = session_end.check(record(tmp_path, *told))
    assert finding.verdict is verdict
    assert finding.reasons
    assert re.search(words, finding.reasons[0]), finding.reasons


def test_a_guest_that_a_leg_lost_is_that_leg_s_to_tell(tmp_path):
    lost = ("leg_ended", {"leg": 1, "outcome": "guest_lost"})
    assert session_end.check(record(tmp_path, LEG[0], lost, ENDS, UNASKED)).verdict is Verdict.VALID


def test_a_run_is_no_session(tmp_path):
    run = record(tmp_path)
    assert session_end.check(RunRecord(run.run_dir, {}, run.scenario, ())).verdict is Verdict.VALID


def test_the_guest_runs_on_though_the_host_that_it_left_does_not_answer(tmp_path):
    """A dead source must not leave the guest paused at its new host."""
    asked = []

    def silent(_timeout_s):
        raise RunBrokenError("the source node does not answer")

    source = SimpleNamespace(
        origin="source", agent=SimpleNamespace(alive=True), client=SimpleNamespace(stand_by=silent)
    )
    dest = SimpleNamespace(origin="dest", client=SimpleNamespace(resume_guest=lambda: asked.append("resume")))
    hosts = SimpleNamespace(hosts={"source": source, "dest": dest}, source=source, dest=dest)
    run_dir = RunDir(tmp_path)
    history = History(run_dir.events)
    session = Session(
        parse('[guest]\nmemory = "64MiB"\n', default_name="by-hand"), "m",
        hosts=hosts, run_dir=run_dir, history=history, interrupt=None,
    )  # fmt: skip
    session.moved("dest")
    with pytest.raises(RunBrokenError, match="does not answer"):
        session.go_on()
    history.close()
    assert asked == ["resume"]
    assert [event.name for event in history.having("guest_resumed")] == ["guest_resumed"]
