"""The way of a run against scripted nodes: what is asked of whom, and what happens when they do not answer."""

# ruff: noqa: N802 - the names of calls are the schema's

import json
import os
import queue
import threading
from concurrent import futures
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from migration.pb import node_pb2, node_pb2_grpc
from testbed.errors import InterruptedRunError, RunBrokenError
from testbed.history import History
from testbed.interrupt import Interrupt
from testbed.node_client import NodeClient, parse_fields
from testbed.record.run_dir import create
from testbed.run import session as sessions
from testbed.run.attempts import retry_pause_ms
from testbed.run.session import Session
from testbed.scenario.file import parse
from testbed.scenario.migration_keys import RETRIES_MAX

TEXT = '[guest]\nmemory = "16MiB"\n[run]\nsettle = "0ms"\nrun_on = "50ms"\n'


class ScriptedNode(node_pb2_grpc.NodeServicer):
    """A node that does what the test says. `calls` is what was asked of it, in order."""

    def __init__(self, name, state):
        self.name = name
        self.state = state
        self.calls = []
        self.events = queue.SimpleQueue()
        self.on_migrate = lambda: None
        self.on_cancel = lambda: None
        self.refuses_cancel = False
        self.clock_ns = 0

    def tell(self, event, **fields):
        self.clock_ns += 1
        self.events.put(node_pb2.NodeEvent(at_ns=self.clock_ns, name=event, fields_json=json.dumps(fields)))

    def Watch(self, request, context):
        while (event := self.events.get()) is not None:
            yield event

    def GuestStatus(self, request, context):
        return node_pb2.GuestStatusReply(state=self.state, guest_epoch=1, pages=4096, actual=256)

    def SetBalloon(self, request, context):
        self.calls.append(f"balloon {request.num_pages}")
        return node_pb2.SetBalloonReply()

    def Migrate(self, request, context):
        self.calls.append("migrate")
        self.request = request
        self.on_migrate()
        return node_pb2.MigrateReply()

    def Cancel(self, request, context):
        self.calls.append(f"cancel: {request.reason}")
        if self.refuses_cancel:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no migration is under way")
        self.on_cancel()
        return node_pb2.CancelReply(effective=True, phase="PRECOPY")

    def PauseGuest(self, request, context):
        self.calls.append("pause")
        self.state = "paused"
        return node_pb2.PauseGuestReply()

    def CheckGuest(self, request, context):
        self.calls.append(f"check {len(request.expectations)}")
        return node_pb2.CheckGuestReply(ok=True, checked_items=len(request.expectations) // 16)

    def Artifact(self, request, context):
        self.calls.append(f"artefact {request.name}")
        if request.name == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "no artefact 'missing'\nsecond line")
        yield node_pb2.ArtifactPiece(data=b"piece one, ")
        yield node_pb2.ArtifactPiece(data=request.name.encode())


class Bench:
    """Two scripted nodes behind real sockets, and a session that drives them."""

    def __init__(self, tmp_path, overrides=()):
        self.scenario = parse(TEXT, default_name="scripted", overrides=overrides)
        self.run_dir = create(tmp_path / "runs", "scripted", 1)
        self.history = History(self.run_dir.events)
        self.interrupt = Interrupt()
        self.interrupt.listen(lambda: self.history.note("interrupted"))
        self.source, self.dest = ScriptedNode("source", "running"), ScriptedNode("dest", "standby")
        self.servers, self.hosts = [], {}
        for node in (self.source, self.dest):
            self.hosts[node.name] = self._serve(node)
        self.session = Session(
            self.scenario,
            "scripted-1",
            hosts=SimpleNamespace(hosts=self.hosts, collect=lambda: None, **self.hosts),
            run_dir=self.run_dir,
            history=self.history,
            interrupt=self.interrupt,
        )

    def _serve(self, node):
        server = grpc.server(futures.ThreadPoolExecutor(4))
        node_pb2_grpc.add_NodeServicer_to_server(node, server)
        checker = health.HealthServicer()
        checker.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        self.servers.append(server)
        client = NodeClient(node.name, f"127.0.0.1:{port}", self.history)
        client.wait_until_serving(10, still_worth_it=lambda: True)
        process = SimpleNamespace(pid=os.getpid(), alive=True, cpu_seconds=lambda: 0.0)
        return SimpleNamespace(
            origin=node.name,
            node=process,
            agent=process,
            client=client,
            migration_address="127.0.0.1:1",
            server_name="",
        )

    def ends(self, outcome, artefacts=(), cause=""):
        """What the source tells when a migration is over."""
        counted = {"payload": 0, "grpc": 0, "wire_tx": 0, "wire_rx": 0}
        self.source.tell(
            "migration_ended", outcome=outcome, reason="scripted", bytes=counted, artefacts=list(artefacts),
            cause=cause,
        )  # fmt: skip

    def completes(self):
        self.source.state, self.dest.state = "frozen", "running"
        self.dest.tell("guest_running", at_ns=1, guest_epoch=2)
        self.ends("completed", ["source_hashes"])

    def note(self, name):
        event = self.history.first(lambda event: event.origin == "testbed" and event.name == name)
        return event.fields if event is not None else None

    def close(self):
        for node in (self.source, self.dest):
            node.events.put(None)
        for host in self.hosts.values():
            host.client.close()
        for server in self.servers:
            server.stop(None).wait()
        self.history.close()


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(*overrides):
        made.append(Bench(tmp_path, overrides))
        made[-1].source.tell("guest_ready")
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(sessions, "OUTCOME_S", 0.3)
    monkeypatch.setattr(sessions, "RUNNING_S", 2.0)


def test_a_completed_migration_is_followed_to_the_destination(bench):
    run = bench("migration.bandwidth=1Gbit/s", "balloon.num_pages=256")
    run.run_dir.artefact("source.oracle").write_bytes(bytes(32) + b"torn")
    run.source.on_migrate = run.completes
    run.session.run()
    assert run.source.calls == ["balloon 256", "migrate", "artefact source_hashes"]
    assert run.dest.calls == ["pause", "check 16", "artefact dest_hashes"]
    assert run.source.request.bandwidth_bytes_per_second == 125_000_000
    assert run.source.request.migration == "scripted-1"
    assert run.run_dir.artefact("dest_hashes").read_bytes() == b"piece one, dest_hashes"
    assert run.note("guest_checked") == {
        "host": "dest", "ok": True, "problems": [], "checked_items": 1, "expected_items": 1,
    }  # fmt: skip
    assert run.note("cpu_used").keys() == {"source", "dest", "guest"}


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_after_a_failure_the_guest_is_checked_at_the_source(bench, outcome):
    run = bench()
    run.source.on_migrate = lambda: run.ends(outcome)
    run.session.run()
    assert run.source.calls == ["migrate", "pause", "check 0"]
    assert run.dest.calls == []


def test_a_lost_guest_is_asked_nothing(bench):
    run = bench()
    run.source.on_migrate = lambda: run.ends("guest_lost")
    run.session.run()
    assert run.source.calls == ["migrate"]


def test_the_first_ctrl_c_cancels_and_waits_for_the_outcome(bench):
    run = bench()
    run.source.on_migrate = run.interrupt.press
    run.source.on_cancel = lambda: run.ends("cancelled")
    run.session.run()
    assert run.source.calls == ["migrate", "cancel: interrupted by the user", "pause", "check 0"]
    assert run.note("cancel_asked")["effective"] is True


def test_a_commit_that_overtakes_the_cancel_is_followed_to_the_destination(bench):
    run = bench()
    run.source.on_migrate = run.interrupt.press
    run.source.on_cancel = run.completes
    run.session.run()
    assert run.dest.calls[:2] == ["pause", "check 0"]


def test_the_second_ctrl_c_gives_up_waiting(bench, monkeypatch):
    monkeypatch.setattr(sessions, "OUTCOME_S", 30.0)
    run = bench()
    run.source.on_migrate = run.interrupt.press
    run.source.on_cancel = lambda: threading.Timer(0.05, run.interrupt.press).start()
    with pytest.raises(InterruptedRunError):
        run.session.run()


def test_ctrl_c_before_the_migration_begins_none(bench):
    run = bench()
    run.interrupt.press()
    with pytest.raises(InterruptedRunError):
        run.session.run()
    assert run.source.calls == []


class Failing:
    """Attempts of a source that fail for a lost destination, `times` times; then one is like `afterwards`."""

    def __init__(self, run, times, afterwards):
        self.run, self.left, self.afterwards = run, times, afterwards

    def __call__(self):
        self.left -= 1
        self.run.ends("failed", cause="destination") if self.left >= 0 else self.afterwards()


def test_attempts_follow_each_other_after_pauses_that_double(bench):
    run = bench("migration.retries=3", "migration.retry_pause=20ms")
    run.source.on_migrate = Failing(run, 3, run.completes)
    run.session.run()
    assert run.source.calls[:4] == ["migrate"] * 4
    pauses = run.history.having("migration_retried")
    assert [event.fields["pause_ms"] for event in pauses] == [20, 40, 80]
    asked = run.history.having("migration_requested")[1:]
    for told, following in zip(pauses, asked, strict=True):
        assert following.at_ns - told.at_ns >= told.fields["pause_ms"] * 1_000_000
        assert told.fields["attempt"] == following.fields["attempt"]


def test_a_wish_to_cancel_between_two_attempts_ends_them(bench):
    run = bench("migration.retries=100", "migration.retry_pause=60s")
    run.source.refuses_cancel = True  # it has no migration
    run.source.on_migrate = Failing(run, 1, run.completes)
    answers = []

    def cancel(event):
        if event.name == "migration_retried":
            answers.append(run.session.cancel("enough"))

    run.history.subscribe(cancel)
    run.session.run()
    assert answers == [{"effective": True, "phase": "BETWEEN_ATTEMPTS"}]
    assert run.source.calls == ["migrate", "cancel: enough", "pause", "check 0"]
    with pytest.raises(RunBrokenError, match="no migration"):
        run.session.cancel("once more")


def test_a_wish_that_meets_an_attempt_being_asked_for_is_passed_on_to_it(bench):
    run = bench("migration.retries=1", "migration.retry_pause=0ms")
    run.source.refuses_cancel = True
    asked_for = []

    def cancel(event):
        if event.name == "migration_requested" and event.fields["attempt"] == 2:
            asked_for.append(run.session.cancel("enough"))
            run.source.refuses_cancel = False

    run.history.subscribe(cancel)
    run.source.on_migrate = Failing(run, 1, lambda: None)
    run.source.on_cancel = lambda: run.source.calls.count("migrate") == 2 and run.ends("cancelled")
    run.session.run()
    assert asked_for == [{"effective": True, "phase": "BETWEEN_ATTEMPTS"}]
    assert run.source.calls[:4] == ["migrate", "cancel: enough", "migrate", "cancel: enough"]


def test_ctrl_c_ends_the_pause_before_another_attempt(bench):
    run = bench("migration.retries=1", "migration.retry_pause=60s")
    run.history.subscribe(lambda event: event.name == "migration_retried" and run.interrupt.press())
    run.source.on_migrate = Failing(run, 1, run.completes)
    with pytest.raises(InterruptedRunError):
        run.session.run()
    assert run.source.calls == ["migrate"]


@pytest.mark.parametrize(
    ("first_ms", "pauses"),
    [
        (0, [0, 0, 0]),
        (1000, [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]),
        (45_000, [45_000, 45_000]),  # who states more has more
    ],
)
def test_the_pause_before_an_attempt_doubles_up_to_a_bound(first_ms, pauses):
    assert [retry_pause_ms(first_ms, attempt) for attempt in range(1, len(pauses) + 1)] == pauses
    assert retry_pause_ms(first_ms, RETRIES_MAX) == pauses[-1]


def test_a_source_that_stays_silent_is_asked_to_cancel(bench):
    run = bench("migration.timeout=1ms")
    run.source.on_cancel = lambda: run.ends("cancelled")
    run.session.run()
    assert run.source.calls[:2] == ["migrate", "cancel: no outcome within 1 s"]


def test_a_source_that_stays_silent_even_then_breaks_the_run(bench):
    run = bench("migration.timeout=1ms")
    with pytest.raises(RunBrokenError, match="the cancelled migration's outcome"):
        run.session.run()


def test_a_source_that_dies_ends_the_wait_with_its_last_words(bench):
    run = bench()

    def die():
        run.hosts["source"].node.alive = False
        run.history.note(
            "process_ended",
            process="source-node",
            asked=False,
            status="was killed by SIGKILL",
            last_words="bye",
        )

    run.source.on_migrate = die
    with pytest.raises(RunBrokenError, match="the source node was killed by SIGKILL: bye"):
        run.session.run()


def test_a_guest_that_never_runs_there_breaks_the_run(bench, monkeypatch):
    monkeypatch.setattr(sessions, "RUNNING_S", 0.1)
    run = bench()
    run.source.on_migrate = lambda: run.ends("completed")
    with pytest.raises(RunBrokenError, match="the guest to run at the destination"):
        run.session.run()


def test_a_refusal_is_one_line_that_names_node_and_call(bench):
    run = bench()
    with pytest.raises(RunBrokenError) as caught:
        run.hosts["source"].client.save_artefact("missing", run.run_dir.artefact("missing"), 5)
    assert str(caught.value) == "Artifact missing at the source node: not found: no artefact 'missing'"
    assert not run.run_dir.artefact("missing").exists()


def test_a_node_that_ends_while_it_starts_is_noticed_at_once(tmp_path):
    history = History(tmp_path / "events.jsonl")
    client = NodeClient("dest", f"unix:{tmp_path}/nobody", history)
    with pytest.raises(RunBrokenError, match="the dest node ended while it started"):
        client.wait_until_serving(60, still_worth_it=lambda: False)
    client.close()
    history.close()


def test_fields_that_are_no_object_are_kept_as_text():
    assert parse_fields('{"a": 1}') == {"a": 1}
    assert parse_fields("") == {}
    assert parse_fields("[1]") == {"malformed": "[1]"}
    assert parse_fields("{") == {"malformed": "{"}


@pytest.mark.parametrize(
    ("overrides", "least_s"),
    [
        (["migration.on_timeout=switch", "migration.bandwidth=2MiB/s"], 5 + 512 + 10),
        (
            ["migration.on_timeout=switch", "migration.bandwidth=2MiB/s", "migration.link_timeout=4s"],
            5 + 512 + 4,
        ),
        (["migration.on_timeout=cancel", "migration.bandwidth=2MiB/s"], 5),
    ],
)
def test_a_migration_that_switches_when_out_of_time_may_send_its_rounds_to_the_end(overrides, least_s):
    """512 MiB at 2 MiB/s: the round under way takes 256 s, and the last one may as well."""
    asked = parse(
        TEXT, default_name="slow", overrides=["guest.memory=512MiB", "migration.timeout=5s", *overrides]
    )
    grace_s = sessions.OUTCOME_S + sessions.OUTCOME_S_PER_GIB / 2
    assert sessions.outcome_limit_s(asked.legs[0], asked) == least_s + grace_s
