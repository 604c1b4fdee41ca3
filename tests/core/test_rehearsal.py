"""What a rehearsal is beside the machines: its times, its tracker, and an agent that only pauses."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from guest_agent.control import Request
from guest_agent.errors import OperationRefused
from host.errors import TrackerUnavailable
from host.trackers import choose
from linux_guest.agent import Agent, Beats
from source_node.accounting import Stopwatch
from virtio.sideband import REQUESTS

MS = 1_000_000


def test_the_downtime_of_a_rehearsal_ends_when_the_guest_runs_on_and_leaves_out_the_hashing():
    watch = Stopwatch(requested_ns=1 * MS, first_round_ns=3 * MS)
    watch.pause_ordered(10 * MS)
    watch.passed("save", 20 * MS)
    watch.passed("prepare", 50 * MS)
    watch.passed("verify", 80 * MS)
    watch.rehearsed(81 * MS, verify_ns=25 * MS)
    watch.ended_ns = 90 * MS
    times = watch.times()
    assert times["downtime_ms"] == 81 - 10 - 25 - 30
    assert times["total_ms"] == 81 - 1 - 55
    assert times["verify_ms"] == 55
    assert times["downtime_parts_ms"]["prepare"] == 5
    assert times["downtime_parts_ms"]["resume"] == 1
    assert watch.decided_ns == 0, "nothing was decided: the guest is not the destination's"


@pytest.mark.parametrize(("requested", "reason"), [("hash", ""), ("auto", "no userfaultfd")])
def test_hashes_go_with_hints_where_the_guest_stays_and_nowhere_else(requested, reason):
    name, why = choose(requested, reason, hints=True, rehearsal=True)
    assert name == "hash"
    assert why
    with pytest.raises(TrackerUnavailable):
        choose(requested, reason, hints=True, rehearsal=False)


class Group:
    """A freezer group that only remembers."""

    frozen = False

    def freeze(self):
        self.frozen = True

    def thaw(self):
        self.frozen = False


@pytest.fixture(name="agent")
def fixture_agent(tmp_path):
    kinds = np.array([0, 1, 1, 2, 3, 3, 3, 0], np.uint8)
    agent = Agent(
        tmp_path / "a.agent",
        guest=SimpleNamespace(alive=True, ram_mapping=lambda: SimpleNamespace(base_address=0x60000000)),
        group=Group(),
        ram=SimpleNamespace(size=8 * 4096, fd=0),
        frames=SimpleNamespace(kinds=lambda: kinds),
        workloads=SimpleNamespace(alive=[], evidence=lambda: [{"name": "m"}], check=lambda: (5, ["gone"])),
        beats=Beats(tmp_path / "a.beats"),
        markers_path=tmp_path / "markers.json",
    )
    yield agent
    agent.close()
    agent._beats.close()


def ask(agent, op, **fields):
    return agent._handle(Request(op, {"id": 1, **fields}, []))


def test_it_counts_pages_by_the_guests_own_frame_table(agent):
    fields = ask(agent, "hello").fields
    assert (fields["kind"], fields["state"], fields["guest_epoch"]) == ("linux", "running", 1)
    assert (fields["free_pages"], fields["ballooned_pages"], fields["held_pages"]) == (2, 1, 3)


def test_a_pause_freezes_and_only_its_own_epoch_thaws(agent):
    assert ask(agent, "pause").fields["ring_bases"] == [0] * 5
    assert ask(agent, "pause").fields["paused_at_ns"] > 0, "twice is once"
    assert agent._group.frozen
    with pytest.raises(OperationRefused, match="epoch 1"):
        ask(agent, "resume", guest_epoch=2)
    assert agent._group.frozen
    ask(agent, "resume", guest_epoch=1)
    assert not agent._group.frozen


def test_frames_and_markers_are_of_one_frozen_moment(agent, tmp_path):
    for operation in ("frames", "check"):
        with pytest.raises(OperationRefused, match="running"):
            ask(agent, operation)
    ask(agent, "pause")
    (memfd,) = ask(agent, "frames").owned_fds
    assert os.pread(memfd, 100, 0) == bytes([0, 1, 1, 2, 3, 3, 3, 0])
    os.close(memfd)
    assert json.loads((tmp_path / "markers.json").read_text()) == [{"name": "m"}]
    assert ask(agent, "check").fields == {"ok_items": 5, "problems": ["gone"]}


@pytest.mark.parametrize("op", ["save", "restore", "run", "discard", "freeze", "throttle"])
def test_what_would_take_the_guest_elsewhere_is_refused(agent, op):
    assert op in REQUESTS
    with pytest.raises(OperationRefused, match="cannot leave its host"):
        ask(agent, op)


def test_beats_are_written_as_they_are_heard(tmp_path):
    beats = Beats(tmp_path / "beats")
    for beat in (1, 2, 5):
        beats(beat)
    beats.close()
    found = np.fromfile(tmp_path / "beats", "<u8").reshape(-1, 3)
    assert found[:, 1].tolist() == [1, 1, 1]
    assert found[:, 2].tolist() == [1, 2, 5]
    assert (np.diff(found[:, 0]) >= 0).all()
