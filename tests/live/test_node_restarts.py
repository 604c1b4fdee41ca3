"""A node process is killed and started again while its guest lives: the journal decides (DESIGN 3.4).

The kill is at a stated event of the history; the same command line is started again; the guest agent and the
other host never notice more than a silence.
"""

import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

import grpc
import psutil
import pytest

from migration.pb import node_pb2, node_pb2_grpc
from tests.live.runs import WAIT_S, WRITER, Bed, misbehave, scenario, waited_for

# Sixteen hundred kept pages at this rate are the better part of a second: time to interfere.
SLOW = ("migration.bandwidth=16MiB/s",)
BALLOONED = 768


class Restarted:
    """The node of one host, killed and started again by us."""

    def __init__(self, host):
        self._host = host
        process = psutil.Process(host.node.pid)
        self._command, self._environment = process.cmdline(), process.environ()

    def kill(self):
        os.kill(self._host.node.pid, signal.SIGKILL)
        assert self._host.node.current.wait(WAIT_S)
        return self

    @property
    def journal(self):
        return Path(self._command[self._command.index("--journal") + 1])

    def __enter__(self):
        log = self._host.node.current.log.open("ab")
        self._process = subprocess.Popen(self._command, env=self._environment, stderr=log)
        log.close()
        control = self._command[self._command.index("--control") + 1]
        self._channel = grpc.insecure_channel(control, options=[("grpc.max_reconnect_backoff_ms", 200)])
        grpc.channel_ready_future(self._channel).result(WAIT_S)
        self.node = node_pb2_grpc.NodeStub(self._channel)
        self.events = self.node.Watch(node_pb2.WatchRequest(), timeout=60)
        return self

    def __exit__(self, *error):
        self.node.Shutdown(node_pb2.ShutdownRequest(), timeout=10)
        self._channel.close()
        assert self._process.wait(WAIT_S) == 0

    def wait(self, name):
        """The next event of this name since the start of the new process."""
        for event in self.events:
            if event.name == name:
                return event
        raise AssertionError(f"{name} never came")

    def status(self):
        return self.node.GuestStatus(node_pb2.GuestStatusRequest(), timeout=10)

    def journal_states(self):
        with sqlite3.connect(self.journal) as database:
            rows = database.execute("SELECT attempt, state FROM attempts ORDER BY rowid").fetchall()
        database.close()
        return rows


def retry(bed, source, attempt):
    request = node_pb2.MigrateRequest(
        migration="bed", attempt=attempt, dest_address=bed.hosts.dest.migration_address, skip="both",
        tracker="auto", integrity="full", rounds_max=10, downtime_limit_ms=300, hint_wait_ms=100,
    )  # fmt: skip
    source.node.Migrate(request, timeout=10)
    return source.wait("migration_ended").fields_json


def test_a_source_node_killed_in_a_round_burns_the_attempt_and_can_try_again(tmp_path):
    with Bed(tmp_path, scenario(*SLOW)) as bed:
        killed = Restarted(bed.hosts.source)
        bed.begin(skip="hint")
        bed.wait("progress", "source")
        with killed.kill() as source:
            source.wait("guest_attached")
            assert source.journal_states() == [(1, "ABORTED")]
            assert source.status().state == "running"
            waited_for(lambda: source.status().held_pages == 0, "DONE to reach the guest")
            assert '"outcome":"completed"' in retry(bed, source, attempt=2)
            bed.wait("guest_running", "dest")


def test_a_node_that_forgot_which_pages_are_ballooned_sends_them_like_any_other(tmp_path):
    with Bed(tmp_path, scenario()) as bed:
        bed.source.set_balloon(BALLOONED)
        waited_for(lambda: bed.source.guest_status().ballooned_pages == BALLOONED, "the balloon to inflate")
        with Restarted(bed.hosts.source).kill() as source:
            source.wait("guest_attached")
            request = node_pb2.GuestStatusRequest()
            waited_for(
                lambda: json.loads(source.node.GuestStatus(request, timeout=10).balloon_json)["ready"],
                "the driver to find its device again",
            )
            ended = json.loads(retry(bed, source, attempt=1))
            assert ended["outcome"] == "completed", ended["reason"]
            assert next(totals["ballooned_pages"] for totals in ended["hints"]["rounds"]) == 0
            bed.wait("guest_running", "dest")
            waited_for(
                lambda: bed.dest.guest_status().ballooned_pages == BALLOONED, "the balloon to be there"
            )
            bed.check(bed.dest)


@pytest.mark.parametrize("journal_says", ["STARTED", "COMMITTING"])
def test_a_source_node_killed_while_its_guest_is_paused_lets_it_run_on(tmp_path, monkeypatch, journal_says):
    """COMMITTING: the destination heard no Commit and saw its stream break, or end, so it answers ABORTED."""
    misbehave(monkeypatch, "b:host.impatient")
    with Bed(tmp_path, scenario("migration.rounds_max=1", text=WRITER)) as bed:
        killed = Restarted(bed.hosts.source)
        bed.begin(bandwidth_bytes_per_second=8 << 20)
        bed.wait("guest_paused", "source")
        killed.kill()
        bed.wait("aborted", "dest")
        if journal_says == "COMMITTING":
            with sqlite3.connect(killed.journal) as database:
                database.execute("UPDATE attempts SET state = 'COMMITTING', digest = '00000000000000ff'")
            database.close()
        with killed as source:
            if journal_says == "COMMITTING":
                assert '"outcome":"failed"' in source.wait("migration_ended").fields_json
            else:
                source.wait("guest_resumed")
                told = source.wait("migration_ended").fields_json
                assert '"reason":"the source node restarted"' in told, "its predecessor did not live to tell"
            assert source.journal_states() == [(1, "ABORTED")]
            waited_for(lambda: source.status().state == "running", "the guest to run on")
            assert '"outcome":"completed"' in retry(bed, source, attempt=2)


def test_a_destination_node_killed_while_it_receives_comes_back_without_the_attempt(tmp_path):
    with Bed(tmp_path, scenario(*SLOW)) as bed:
        killed = Restarted(bed.hosts.dest)
        since_ns = bed.begin()
        bed.wait("progress", "source")
        killed.kill()
        assert bed.wait("migration_ended", "source", since_ns=since_ns).fields["outcome"] == "failed"
        with killed as dest:
            dest.wait("guest_attached")
            assert dest.journal_states() == [(1, "ABORTED")]
            facts = dest.node.Describe(node_pb2.DescribeRequest(), timeout=10)
            ended = bed.migrate(dest_address=facts.migration_address, bandwidth_bytes_per_second=0)
            assert ended.fields["outcome"] == "completed"
            assert dest.status().state == "running"
