"""The schedule of faults against hosts in words: each comes at its moment, in its leg, and is healed in time."""

import queue
import subprocess
import threading
from types import SimpleNamespace

import pytest

from testbed.checkers import faults as checker
from testbed.errors import RunBrokenError, UsageError
from testbed.faults.errors import FaultError
from testbed.history import History
from testbed.run.fault_schedule import Schedule
from testbed.scenario.fault_keys import restarted
from testbed.scenario.file import parse

GUEST = '[guest]\nmemory = "64MiB"\n'


def fault(**keys):
    lines = (f"{key} = {'true' if value is True else repr(value)}\n" for key, value in keys.items())
    return "[[fault]]\n" + "".join(lines)


class Process:
    """A process that is killed, paused and started again in words."""

    def __init__(self, told):
        self.alive, self._told = True, told

    def kill(self):
        self._told.put("kill")
        self.alive = False

    def restart(self):
        self._told.put("restart")
        self.alive = True

    def pause(self):
        self._told.put("pause")

    def resume(self):
        self._told.put("resume")


class Stage:
    """A schedule over hosts in words; `told` is what happened, in order."""

    def __init__(self, tmp_path, text):
        self.told = queue.SimpleQueue()
        self.hears = True  # whether the node answers the next release
        self.history = History(tmp_path / "events.jsonl")
        self.scenario = parse(GUEST + text, default_name="x")
        client = SimpleNamespace(
            arm_point=lambda point, _: self.told.put(f"arm {point}"),
            release_point=self.release,
        )
        elsewhere = SimpleNamespace(
            arm_point=lambda point, _: self.told.put(f"arm {point} on b"), release_point=self.release
        )
        hosts = {
            origin: SimpleNamespace(
                origin=origin, node=Process(self.told), agent=Process(self.told),
                client=elsewhere if origin == "dest" and len(self.scenario.legs) > 1 else client,
                network_pid=None, container=None, migration_address="",
            )
            for origin in ("source", "dest")
        }  # fmt: skip
        bed = SimpleNamespace(hosts=hosts, source=hosts["source"], dest=hosts["dest"])
        self.hosts = hosts
        self.schedule = Schedule(self.scenario, "abcd", hosts=bed, history=self.history)

    def release(self, point, timeout_s):
        assert timeout_s <= 1, "a node that stands still would hold everybody up"
        self.told.put(f"release {point}")
        if not self.hears:
            self.hears = True
            raise RunBrokenError("deadline exceeded")

    def next(self):
        return self.told.get(timeout=10)

    def reach(self, point, origin="source"):
        self.history.record(origin, "point_reached", {"point": point}, 0)


@pytest.fixture
def stage(tmp_path):
    made = []

    def make(text):
        made.append(Stage(tmp_path, text))
        return made[-1]

    yield make
    for one in made:
        one.history.close()


THERE_AND_BACK = '[[leg]]\nto = "b"\n[[leg]]\nto = "a"\n[[leg]]\nto = "b"\n'


def killing(**keys):
    return fault(kind="kill", what="guest_agent", **keys)


def test_a_fault_of_a_leg_comes_at_the_point_of_that_legs_hosts(stage):
    one = stage(THERE_AND_BACK + killing(at="commit.sent", leg=2))
    with one.schedule:
        assert one.next() == "arm commit.sent on b", "b gives the guest away in leg 2"
        one.history.note("leg_started", leg=1)
        one.history.note("leg_started", leg=2)
        one.reach("commit.sent", "dest")
        assert [one.next(), one.next()] == ["kill", "release commit.sent"]
    (applied,) = one.history.having("fault_applied")
    assert applied.fields["leg"] == 2


def test_a_host_that_comes_to_the_point_in_an_earlier_leg_goes_on_and_is_held_in_the_right_one(stage):
    one = stage(THERE_AND_BACK + killing(at="open.sent", leg=3))
    with one.schedule:
        assert one.next() == "arm open.sent"
        one.history.note("leg_started", leg=1)
        one.reach("open.sent")
        assert [one.next(), one.next()] == ["release open.sent", "arm open.sent"]
        one.history.note("leg_started", leg=3)
        one.reach("open.sent")
        assert [one.next(), one.next()] == ["kill", "release open.sent"]


def test_the_clock_of_a_fault_of_a_leg_begins_with_the_request_of_that_leg(stage):
    one = stage(THERE_AND_BACK + killing(at="1ms", leg=2))
    with one.schedule:
        for leg in (1, 2):
            asked = one.history.note("leg_started", leg=leg)
            one.history.note("migration_requested")
        assert one.next() == "kill"
    (applied,) = one.history.having("fault_applied")
    assert applied.fields["leg"] == 2
    assert applied.at_ns - asked.at_ns >= 1_000_000


def test_a_fault_of_a_leg_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="there is no leg 4: this scenario has 3"):
        parse(GUEST + THERE_AND_BACK + killing(at="commit.sent", leg=4), default_name="x")


@pytest.mark.parametrize(
    ("what", "order"),
    [
        ("guest_agent", ["pause", "release prepare.received", "resume"]),
        ("source_node", ["pause", "release prepare.received", "resume"]),
        (
            "dest_node",
            ["pause", "resume", "release prepare.received"],
        ),  # it stands still: it would hear nothing
    ],
)
def test_a_node_at_a_point_goes_on_when_the_fault_is_in_force_and_it_can_hear(stage, what, order):
    on = stage(fault(kind="pause", what=what, at="prepare.received", **{"for": "20ms"}))
    with on.schedule:
        assert on.next() == "arm prepare.received"
        on.reach("prepare.received", "dest")
        assert [on.next() for _ in order] == order
    (applied,) = on.history.having("fault_applied")
    (healed,) = on.history.having("fault_healed")
    assert applied.fields["at"] == "prepare.received"
    assert healed.fields["why"] == "its time is over"


def test_times_count_from_the_request_and_the_end_heals_what_is_in_force_last_first(stage):
    on = stage(
        fault(kind="pause", what="dest_node", at="1ms") + fault(kind="pause", what="guest_agent", at="30ms")
    )
    with on.schedule:
        on.history.note("migration_requested")
        assert [on.next(), on.next()] == ["pause", "pause"]
        on.history.wait_for(lambda event: event.name == "fault_applied" and event.fields["fault"] == 1, 10)
    assert [on.next(), on.next()] == ["resume", "resume"]
    healed = on.history.having("fault_healed")
    assert [(event.fields["fault"], event.fields["why"]) for event in healed] == [
        (1, "the run ends"), (0, "the run ends"),
    ]  # fmt: skip


def test_everything_is_healed_when_the_run_breaks(stage):
    on = stage(fault(kind="pause", what="dest_node", at="1ms"))
    with pytest.raises(RunBrokenError, match="broken"), on.schedule:  # noqa: PT012 - it breaks in the middle
        on.history.note("migration_requested")
        assert on.next() == "pause"
        raise RunBrokenError("broken")
    assert on.next() == "resume"


def test_what_was_killed_is_started_again_in_time_but_not_when_the_run_ends(stage):
    kill = {"kind": "kill", "what": "source_node", "restart": True}
    on = stage(fault(**kill, at="commit.sent", **{"for": "10ms"}))
    assert restarted(on.scenario.fault) == {"source-node"}
    with on.schedule:
        on.next()
        on.reach("commit.sent")
        assert [on.next(), on.next()] == ["kill", "restart"], "and nobody releases a dead node"
    assert on.told.empty()


def test_a_fault_that_cannot_be_brought_into_force_breaks_the_run_and_frees_the_node(stage, monkeypatch):
    on = stage(fault(kind="pause", what="dest_node", at="stop_copy"))

    def refuse():
        raise FaultError("no such thing")

    monkeypatch.setattr(on.hosts["dest"].node, "pause", refuse)
    with (  # noqa: PT012 - the schedule is left in the middle
        pytest.raises(
            RunBrokenError, match=r"pause \(fault.0\) could not be brought into force: no such thing"
        ),
        on.schedule,
    ):
        assert on.next() == "arm stop_copy"
        on.reach("stop_copy")
        assert on.next() == "release stop_copy"
    (failed,) = on.history.having("fault_failed")
    record = SimpleNamespace(
        scenario=on.scenario, all=lambda name: iter([failed] if name == "fault_failed" else [])
    )
    assert "could not be brought into force" in checker.check(record).reasons[0]


def test_a_node_that_did_not_hear_that_it_may_go_on_is_told_again_when_something_is_healed(stage):
    on = stage(fault(kind="pause", what="guest_agent", at="saved", **{"for": "20ms"}))
    on.hears = False
    with on.schedule:
        on.next()
        on.reach("saved")
        assert [on.next() for _ in range(4)] == ["pause", "release saved", "resume", "release saved"]
    assert len(list(on.history.having("release_unheard"))) == 1


@pytest.mark.parametrize("broken", ["pause", "resume"])
def test_an_error_that_nobody_foresaw_fails_its_fault_and_the_others_go_on(stage, monkeypatch, broken):
    on = stage(
        fault(kind="pause", what="source_node", at="1ms", **{"for": "1ms"})
        + fault(kind="pause", what="dest_node", at="30ms", **{"for": "1ms"})
    )

    def surprise():
        raise subprocess.TimeoutExpired("nft", 20)

    monkeypatch.setattr(on.hosts["source"].node, broken, surprise)
    with pytest.raises(RunBrokenError, match="timed out after 20 seconds"), on.schedule:  # noqa: PT012
        on.history.note("migration_requested")
        healed = on.history.wait_for(lambda event: event.name == "fault_healed", 10)
        assert healed.fields["fault"] == 1, "the thread is there for the next fault"
    (failed,) = on.history.having("fault_failed")
    assert failed.fields["fault"] == 0


def test_the_schedule_heals_a_fault_with_those_in_force_that_came_later(stage):
    on = stage("".join(fault(kind="pause", what="dest_node", at=f"{at}s") for at in (1, 2, 3)))
    seen = []
    in_force = [SimpleNamespace(heal=lambda _, later: seen.append(later) or {}) for _ in range(3)]
    on.schedule._in_force = {number: (in_force[number], None) for number in (2, 0, 1)}  # as they were applied
    on.schedule._heal(0, "its time is over")
    on.schedule._heal(2, "its time is over")
    assert seen == [[in_force[1]], [in_force[1]]]


def test_a_fault_at_a_time_and_one_at_a_point_wait_beside_one_another(stage):
    one = stage(killing(at="600s") + fault(kind="pause", what="guest_agent", at="saved"))
    with one.schedule:
        assert one.next() == "arm saved"
        one.history.note("migration_requested")
        one.reach("saved")
        assert [one.next(), one.next()] == ["pause", "release saved"]


def test_a_schedule_that_ends_by_itself_breaks_the_run(stage):
    """Otherwise the run would go on without its faults, and be judged as if they had come."""
    one = stage(killing(at="saved"))

    def run():
        with one.schedule:
            assert one.next() == "arm saved"
            one.schedule._reached = ended = Unexpected()
            one.reach("saved")
            assert ended.called.wait(10)

    with pytest.raises(RunBrokenError, match="the schedule of the faults ended: nobody expected this"):
        run()


class Unexpected:
    def __init__(self):
        self.called = threading.Event()

    def __call__(self, _event):
        self.called.set()
        raise AssertionError("nobody expected this")
