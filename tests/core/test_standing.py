"""Standing sessions: which one a command means, what an answer is, and what is refused before anything happens."""

import io
import json
import socket
import threading
from types import SimpleNamespace

import pytest

from testbed.errors import MachineCannotError, RunBrokenError, UsageError
from testbed.history import Event
from testbed.hosts import runtime_dir
from testbed.record.run_dir import RunDir
from testbed.scenario.file import parse
from testbed.standing import keeper, sessions
from testbed.standing.by_hand import ByHand
from testbed.standing.keeper import Voice
from testbed.standing.sessions import StandingSession

SCENARIO = """
name = "by-hand"
[guest]
memory = "64MiB"
"""


@pytest.fixture
def runtimes(tmp_path, monkeypatch):
    """Where runtime directories go; each that is made there is alive until it is dropped."""
    monkeypatch.setattr(runtime_dir, "base", lambda: tmp_path)
    monkeypatch.setattr(runtime_dir, "FALLBACK", tmp_path)
    return tmp_path


def stand(runtimes, run, started_ns):
    runtime = runtime_dir.RuntimeDir(run)
    run_dir = runtimes / "runs" / run
    run_dir.mkdir(parents=True)
    session = StandingSession(run, "by-hand", started_ns, 1, run_dir, runtime.path)
    session.write()
    return session, runtime


def test_the_newest_live_session_is_meant_unless_one_is_named(runtimes):
    older, keep_older = stand(runtimes, "0000000a", 1)
    newer, keep_newer = stand(runtimes, "0000000b", 2)
    assert sessions.choose(None) == newer
    assert sessions.choose(older.run_dir) == older
    assert sessions.choose(older.runtime) == older
    keep_newer.remove()
    assert sessions.choose(None) == older
    keep_older.remove()
    with pytest.raises(UsageError, match="no session stands: `ballast up"):
        sessions.choose(None)


def test_a_session_whose_keeper_died_is_told_with_what_to_do(runtimes, monkeypatch):
    dead, _keep = stand(runtimes, "0000000a", 1)
    monkeypatch.setattr(runtime_dir, "is_dead", lambda _: True)
    for wanted in (dead.run_dir, None):
        with pytest.raises(UsageError, match="has died: `ballast clean`"):
            sessions.choose(wanted)


def test_a_session_that_has_ended_is_a_record(runtimes):
    ended = runtimes / "ended"
    ended.mkdir()
    (ended / "verdict.json").write_text("{}")
    with pytest.raises(UsageError, match="has ended; `ballast check"):
        sessions.choose(ended)
    with pytest.raises(UsageError, match="is no standing session's run directory"):
        sessions.choose(runtimes)


@pytest.mark.usefixtures("runtimes")
def test_a_run_is_no_session():
    run = runtime_dir.RuntimeDir("0000000c")
    assert sessions.remembered() == []
    run.remove()


def lines(*documents):
    return io.StringIO("".join(json.dumps(document) + "\n" for document in documents))


def test_events_come_before_the_answer():
    told = {"at_ns": 1, "origin": "source", "name": "round_started", "fields": {"round": 1}}
    seen = []
    assert sessions.read_answer(lines({"event": told}, {"answer": {"leg": 1}}), seen.append) == {"leg": 1}
    assert [event.name for event in seen] == ["round_started"]


@pytest.mark.parametrize(("code", "kind"), [(1, RunBrokenError), (2, UsageError), (3, MachineCannotError)])
def test_a_refusal_keeps_its_exit_code(code, kind):
    with pytest.raises(kind, match="as said"):
        sessions.read_answer(lines({"problems": ["as said"], "exit_code": code}), lambda _: None)


def test_a_keeper_that_goes_without_an_answer_is_told():
    with pytest.raises(sessions.KeeperGoneError, match="ballast clean"):
        sessions.read_answer(lines(), lambda _: None)


def test_a_listener_who_went_away_disturbs_nobody():
    calls = []

    def broken(line):
        calls.append(line)
        raise BrokenPipeError

    voice = Voice(broken)
    voice.answer({})
    voice.answer({})
    voice.close(10)
    assert len(calls) == 1, "it is not tried again"


def test_a_listener_who_was_stopped_holds_nobody_up_and_finds_everything_when_he_goes_on():
    """Ctrl-Z at `ballast migrate`: the socket is full after some 170 events, and the migration must go on."""
    ours, theirs = socket.socketpair()
    voice = Voice(ours.sendall, ours.close)
    told = [Event(at_ns, "source", "progress", {"what": "x" * 200}) for at_ns in range(4000)]
    speaker = threading.Thread(target=lambda: [voice.event(event) for event in told], daemon=True)
    speaker.start()
    speaker.join(60)
    assert not speaker.is_alive(), "he who does not read must not stop him who speaks"
    voice.answer({"leg": 1})
    voice.close()
    seen = []
    with theirs, theirs.makefile("r") as stream:
        assert sessions.read_answer(stream, seen.append) == {"leg": 1}
    assert [event.at_ns for event in seen] == list(range(4000))


def test_a_listener_who_never_goes_on_is_given_up(monkeypatch):
    monkeypatch.setattr(keeper, "WAITING_LINES_MAX", 3)
    held, reading, written = threading.Event(), threading.Event(), []

    def write(line):
        reading.set()
        held.wait(60)
        written.append(line)

    voice = Voice(write)
    voice.answer({"number": 0})
    assert reading.wait(60)
    for number in range(1, 9):
        voice.answer({"number": number})
    held.set()
    voice.close(60)
    assert [json.loads(line)["answer"]["number"] for line in written] == [0, 1, 2, 3]


@pytest.fixture
def hands(tmp_path):
    """The hands of a session whose hosts are names only: what gets past a refusal fails the test."""
    run_dir = RunDir(tmp_path)
    scenario = parse(SCENARIO, default_name="by-hand")
    run_dir.manifest.write_text(json.dumps({"run": "0000000a", "scenario": scenario.model_dump(mode="json")}))
    host = SimpleNamespace(network_pid=None, container=None)
    hosts = SimpleNamespace(hosts={"source": host, "dest": host})
    return ByHand(SimpleNamespace(run_dir=run_dir, hosts=hosts, here="source"), SimpleNamespace())


@pytest.mark.parametrize(
    ("to", "overrides", "expect", "words"),
    [
        ("a", [], "completed", "on a already: --to b"),
        ("c", [], "completed", "this session has a and b"),
        (None, ["guest.memory=1GiB"], "completed", "only keys of"),
        (None, ["migration.skip=some"], "completed", "migration.skip"),
        (None, ["migration.nonsense=1"], "completed", "migration.nonsense"),
        (None, ["nonsense"], "completed", "write key=value"),
        (None, [], "well", "--expect 'well' is none of"),
    ],
)
def test_migrations_that_cannot_be_are_refused_and_not_counted(hands, to, overrides, expect, words):
    with pytest.raises(UsageError, match=words):
        hands.migrate(to, overrides, expect)
    assert hands.legs_made == 0


@pytest.mark.parametrize(("here", "there"), [("source", "b"), ("dest", "a"), ("third", "a")])
def test_a_migration_goes_to_the_first_host_by_name_unless_one_is_named(hands, here, there):
    session, host, made = hands._session, SimpleNamespace(), []
    session.hosts.hosts = {"third": host, "dest": host, "source": host}  # in the order of no name
    session.here = here
    session.make_leg = lambda _number, leg, **_: made.append(leg.to) or "guest_lost"  # nothing to go on with
    hands.migrate(None, [], "completed")
    hands.migrate("c" if here != "third" else "b", [], "completed")
    assert made == [there, "c" if here != "third" else "b"]
    with pytest.raises(UsageError, match=r"is on . already: --to . or .$"):
        hands.migrate({"source": "a", "dest": "b", "third": "c"}[here], [], "completed")


@pytest.mark.parametrize(
    ("kind", "parameters", "error", "words"),
    [
        ("no-such", {}, UsageError, "there is no fault 'no-such'; one of"),
        ("pause", {"what": "nothing"}, UsageError, "what"),
        ("loss", {}, UsageError, "share: is missing"),
        ("pause", {"what": "guest_agent", "host": "z"}, UsageError, "'z' is no host: a, b, c"),
        ("loss", {"share": "1%", "sheer": 1}, UsageError, "sheer: there is no such parameter"),
        ("pause", {"what": "guest_agent", "for": "2s"}, UsageError, "ballast fault heal"),
        ("pause", {"what": "guest_agent", "host": "third"}, UsageError, "there is no host 'third'"),
        ("loss", {"share": "1%"}, MachineCannotError, "--hosts docker"),
        ("disconnect", {}, MachineCannotError, "--hosts docker"),
    ],
)
def test_faults_that_cannot_be_are_refused(hands, kind, parameters, error, words):
    with pytest.raises(error, match=words):
        hands.add_fault(kind, parameters)


class Node:
    """A process that dies and is started again in words."""

    alive = True

    def kill(self):
        self.alive = False

    def restart(self):
        self.alive = True


def test_what_is_killed_by_hand_is_started_again_when_it_is_healed(hands):
    session, node, expected = hands._session, Node(), []
    host = SimpleNamespace(origin="dest", network_pid=None, container=None, node=node)
    session.hosts.hosts["dest"] = host
    session.expect_back = expected.append
    session.history = SimpleNamespace(note=lambda *_, **__: None)
    added = hands.add_fault("kill", {"what": "dest_node", "restart": True})
    assert (node.alive, expected) == (False, [frozenset({"dest-node"})])
    hands.heal_fault(added["fault"]["id"])
    assert node.alive


def test_a_fault_that_is_not_in_force_cannot_be_healed(hands):
    with pytest.raises(UsageError, match="no fault 3 is in force"):
        hands.heal_fault(3)
