"""What the live tests of whole migrations share: small scenarios, one-off runs, and hosts for many attempts.

Rule 1: `perform` is `ballast run` without the command line: real processes, judged, and nothing left behind.
Rule 2: a `Bed` is the same two hosts without the session: for attempts that no scenario can order.
Rule 3: mischief is code of the tests (the folder mischief/), which only children of one test run.
"""

import gc
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil

from migration.pb import node_pb2
from testbed.clock import now_ns
from testbed.history import Event, History
from testbed.hosts import runtime_dir
from testbed.hosts.local import RUN_LABEL
from testbed.hosts.opening import open_hosts
from testbed.hosts.runtime_dir import RuntimeDir
from testbed.interrupt import Interrupt
from testbed.node_client import NodeClient
from testbed.record.oracle_log import last_versions, read_logs
from testbed.record.run_dir import create, write_json
from testbed.record.run_record import load
from testbed.run.runner import FinishedRun, run_scenario
from testbed.scenario.file import parse

MISCHIEF = Path(__file__).with_name("mischief")
WAIT_S = 30.0

# Half of it was used and is free now; a tenth is kept, and a store goes on being written. The hint wait is long,
# so that a busy machine does not decide which pages are skipped; guests that never end a report get a short one.
TINY = """
[guest]
memory = "64MiB"
[[guest.workload]]
name = "freed"
fraction = 0.6
keep = 0.1
[[guest.workload]]
name = "kv"
records = 2000
operations_per_second = 500
[[guest.workload]]
name = "idle"
[migration]
hint_wait = "5s"
[run]
settle = "50ms"
run_on = "50ms"
"""
# A second round is certain: a store of 16 MiB is rewritten as it is sent.
WRITER = """
[guest]
memory = "64MiB"
[[guest.workload]]
name = "freed"
fraction = 0.5
keep = 0.05
[[guest.workload]]
name = "writer"
rate = "4000pages/s"
working_set = "8MiB"
[[guest.workload]]
name = "idle"
[migration]
skip = "both"
hint_wait = "5s"
downtime_limit = "1ms"
rounds_max = 3
bandwidth = "64MiB/s"
[run]
settle = "50ms"
run_on = "50ms"
"""


def scenario(*overrides, text=TINY, expect="completed"):
    return parse(text, default_name="live", overrides=overrides).model_copy(update={"expect": expect})


def misbehave(monkeypatch, *wishes):
    """Arms the mischief of every process that is started from here on."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(MISCHIEF), before))))
    monkeypatch.setenv("BALLAST_MISCHIEF", ",".join(wishes))


def send_elsewhere(monkeypatch, address):
    """Lets the source be told another destination than the one that was started."""
    honest = NodeClient.describe

    def describe(client):
        told = honest(client)
        if client.origin == "dest":
            told.migration_address = address
        return told

    monkeypatch.setattr(NodeClient, "describe", describe)


def perform(out: Path, chosen, watch: Callable[[Event], None] = lambda _: None) -> FinishedRun:
    """One run, and the look at what it left behind."""
    others = memory_held()
    with Interrupt() as interrupt:
        run = run_scenario(chosen, out, interrupt, watch)
    nothing_is_left_of(run.run_dir, others)
    return run


def memory_held():
    """Inodes of the memory files that this very process has open; a test that failed keeps its own alive."""
    gc.collect()
    links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return {fd.stat().st_ino for fd in links if "memfd:" in os.readlink(fd)}  # noqa: PTH115


def nothing_is_left_of(run_dir, others=None):
    """No process, socket, file or memory outside the run's directory.

    `others` is the memory that this process held before a run of its own; a run in another process has none.
    """
    record = load(run_dir.path)
    run = record.manifest["run"]
    for event in record.all("process_started"):
        assert not _is_there(event.fields["pid"]), event.fields
    assert not [pid for pid, label in _labels() if label == run]
    assert not (runtime_dir.base() / f"{runtime_dir.PREFIX}{run}").exists()
    # The kernel collects a socket that was passed, and never received, a moment after its last holder died.
    waited_for(lambda: run not in Path("/proc/net/unix").read_text(), "the run's sockets to go")
    for event in record.all("node_started"):
        host, _, port = event.fields["migration_address"].rpartition(":")
        if not host.startswith("127."):
            continue  # of a network that went with the run
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0, "somebody still listens"
    # Guest RAM is a memfd: it lives exactly as long as somebody holds it, and only we are left.
    assert others is None or not memory_held() - others


def waited_for(is_so, what, within_s=WAIT_S):
    """For states that nobody announces."""
    moment = threading.Event()
    for _ in range(int(within_s / 0.01)):
        if is_so():
            return
        moment.wait(0.01)
    raise AssertionError(f"in vain: {what}")


def _is_there(pid):
    """A dead orphan that init has not reaped yet is nobody's fault here; one of ours would be."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE or process.ppid() == os.getpid()
    except psutil.NoSuchProcess:
        return False


def _labels():
    for process in psutil.process_iter():
        try:
            label = process.environ().get(RUN_LABEL)
        except psutil.Error:
            continue
        if label is not None:
            yield process.pid, label


def is_one_line(reason):
    return bool(reason.strip()) and "\n" not in reason and "Traceback" not in reason


def guest_is_whole(run, host):
    """It ran on there, passed its self-check, and holds nothing for a host that wants no hints any more."""
    record = load(run.run_dir.path)
    checked, ran_on = record.last("guest_checked"), record.last("guest_ran_on")
    assert checked is not None, run.judgement.reasons
    assert ran_on is not None
    assert (checked.fields["host"], checked.fields["ok"]) == (host, True), checked.fields["problems"]
    assert (ran_on.fields["state"], ran_on.fields["held_pages"]) == ("running", 0)
    return record


def log_of(record, process):
    """What a process of the run said."""
    return (record.run_dir.logs / f"{process}.log").read_text()


def hinted(record):
    """Pages that the guest hinted, and so held, before whatever happened."""
    return sum(event.fields["pages"] for event in record.all("hints_stopped", "source"))


def ends(reasons, *checkers):
    """Whether exactly these checkers speak against a run."""
    return {re.match(r"\w+", reason)[0] for reason in reasons} == set(checkers)


class Bed:
    """Two hosts, the source's guest running; every attempt of a migration is the test's own."""

    def __init__(self, out: Path, chosen):
        self.scenario = chosen
        self.run_dir = create(out, chosen.name, chosen.seed)
        self.run_id = secrets.token_hex(4)
        self.attempts = 0
        self._stack = ExitStack()

    def __enter__(self):
        manifest = {"run": self.run_id, "scenario": self.scenario.model_dump(mode="json")}
        write_json(self.run_dir.manifest, manifest)
        with ExitStack() as stack:
            self.history = History(self.run_dir.events)
            stack.callback(self.history.close)
            runtime = RuntimeDir(self.run_id)
            stack.callback(runtime.remove)
            self.hosts = stack.enter_context(
                open_hosts(
                    self.scenario, self.run_id, run_dir=self.run_dir, runtime=runtime,
                    history=self.history, interrupt=Interrupt(),
                )
            )  # fmt: skip
            self.source, self.dest = self.hosts.source.client, self.hosts.dest.client
            self.wait("guest_ready", "source")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()
        nothing_is_left_of(self.run_dir)

    def wait(self, name, origin, since_ns=0, **fields) -> Event:
        return self.wait_for(
            lambda event: (
                event.name == name
                and event.origin == origin
                and event.at_ns >= since_ns
                and fields.items() <= event.fields.items()
            ),
            f"{name} from the {origin}",
        )

    def wait_for(self, matches, what) -> Event:
        found = self.history.wait_for(matches, WAIT_S)
        assert found is not None, f"in vain: {what}"
        return found

    def begin(self, *, migration="bed", attempt=0, dest_address="", **options) -> int:
        """Asks the source; returns the instant before."""
        self.attempts += 1
        chosen, since_ns = self.scenario.migration, now_ns()
        fields = {
            "skip": chosen.skip, "tracker": chosen.tracker, "integrity": chosen.integrity,
            "rounds_max": chosen.rounds_max, "bandwidth_bytes_per_second": chosen.bandwidth,
            "downtime_limit_ms": chosen.downtime_limit, "hint_wait_ms": chosen.hint_wait,
            "timeout_ms": chosen.timeout, "on_rounds_max": chosen.on_rounds_max,
            "dest_server_name": self.hosts.dest.server_name,
        }  # fmt: skip
        address = dest_address or self.hosts.dest.migration_address
        request = node_pb2.MigrateRequest(
            migration=migration, attempt=attempt or self.attempts, dest_address=address, **(fields | options)
        )
        self.history.note("migration_requested", migration=migration, attempt=self.attempts)
        self.source.migrate(request)
        return since_ns

    def migrate(self, **options) -> Event:
        """A whole attempt; the event that ended it."""
        return self.wait("migration_ended", "source", since_ns=self.begin(**options))

    def guest_is_back(self):
        """It runs at the source, and DONE has reached it: it holds nothing any more."""
        assert self.source.guest_status().state == "running"
        waited_for(lambda: self.source.guest_status().held_pages == 0, "the guest to get its pages back")

    def check(self, client):
        """The self-check of the guest there, which stands still afterwards."""
        client.pause_guest()
        logs = [self.run_dir.artefact(f"{origin}.oracle") for origin in ("source", "dest")]
        reply = client.check_guest(last_versions(read_logs(logs)), WAIT_S)
        assert reply.ok, list(reply.problems)
        assert reply.checked_items > 0

    def fetch(self, *names):
        """Artefacts into the run's directory, as a session does."""
        for name in names:
            client = self.dest if name == "dest_hashes" else self.source
            client.save_artefact(name, self.run_dir.artefact(name), WAIT_S)
