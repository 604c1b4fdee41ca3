"""`ballast resolve` on standing sessions: refused while somebody lives; then one host runs the guest."""

import contextlib
import json
import sqlite3
from types import SimpleNamespace

import grpc
import pytest

from migration.pb import node_pb2, node_pb2_grpc
from testbed.hosts import runtime_dir
from tests.live.runs import waited_for
from tests.live.test_session_by_hand import Commands, guest_is_on

pytestmark = pytest.mark.live
HOLD_MS = 60_000


@contextlib.contextmanager
def node(session, host):
    """The control service of a host of a standing session."""
    run = json.loads((session / "manifest.json").read_text())["run"]
    control = runtime_dir.base() / f"{runtime_dir.PREFIX}{run}" / f"{host}.control"
    with grpc.insecure_channel(f"unix:{control}") as channel:
        yield node_pb2_grpc.NodeStub(channel)


def reached(session, point):
    events = [json.loads(line) for line in (session / "events.jsonl").read_text().splitlines()]
    return any(event["name"] == "point_reached" and event["fields"]["point"] == point for event in events)


def states(session, origin):
    with sqlite3.connect(session / "nodes" / origin / "journal.sqlite") as database:
        rows = database.execute("SELECT role, state, detail FROM attempts").fetchall()
    database.close()
    return rows


@pytest.fixture
def stuck(tmp_path):
    """A session whose migration stands at a point; its commands."""
    ballast = Commands(tmp_path)
    session = ballast.up()
    mine = ("--session", str(session))

    def at(host, point):
        with node(session, host) as control:
            control.ArmPoint(node_pb2.ArmPointRequest(point=point, hold_ms_max=HOLD_MS), timeout=10)
        migration = ballast.start("migrate", *mine, "--expect", "failed", "--json")
        waited_for(lambda: reached(session, point), point)
        return SimpleNamespace(ballast=ballast, session=session, mine=mine, migration=migration)

    yield at
    ballast.start("down", *mine).communicate(timeout=120)


def resolve(here, dead, *more, code=0):
    return here.ballast.run("resolve", str(here.session), "--dead", dead, *more, code=code)


def test_a_destination_that_died_before_it_decided_gives_the_guest_back(stuck):
    here = stuck("b", "commit.received")
    complaint = resolve(here, "dest", code=1)[1]
    assert "runs: silence is no proof that it is dead" in complaint[0]
    assert "is no proof" in resolve(here, "dest", "--fenced", "I am sure", code=1)[1][0]
    here.ballast.run("fault", "add", "kill", "what=dest_node", *here.mine)
    told, _ = resolve(here, "dest")
    assert "is ABORTED at host a: the destination is dead and had not committed" in told
    out, _ = here.migration.communicate(timeout=60)
    assert json.loads(out)["outcome"] == "failed"
    assert guest_is_on(here.ballast.json("status", *here.mine)) == ["a"]
    assert [(role, state) for role, state, _ in states(here.session, "dest")] == [("dest", "ABORTED")]
    assert "resolved" in states(here.session, "dest")[0][2]
    assert "resolved by hand" in states(here.session, "source")[0][2]
    resolve(here, "dest")  # again: nothing changes


def test_a_source_that_died_after_committing_leaves_its_guest_to_the_destination(stuck):
    here = stuck("a", "committing.recorded")
    here.ballast.run("fault", "add", "kill", "what=source_node", *here.mine)
    here.migration.communicate(timeout=60)
    told, _ = resolve(here, "source")
    assert "is COMMITTED at host b: the source's journal says COMMITTING" in told
    assert guest_is_on(here.ballast.json("status", *here.mine)) == ["b"]
    assert "resolved by hand" in states(here.session, "dest")[0][2]
    resolve(here, "source")
