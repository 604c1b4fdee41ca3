"""A scenario's legs: what may be said, what a leg takes from [migration], and what is refused."""

import pytest

from testbed.errors import UsageError
from testbed.history import Event
from testbed.record.leg_views import _renamed, legs_of
from testbed.record.run_dir import RunDir
from testbed.record.run_record import RunRecord
from testbed.scenario.document import Scenario
from testbed.scenario.file import parse

GUEST = '[guest]\nmemory = "32MiB"\n'
THERE_AND_BACK = '[[leg]]\nto = "b"\n[[leg]]\nto = "a"\nskip = "zero"\n[[leg]]\nto = "c"\nsettle = "50ms"\n'


def scenario(text, *overrides):
    return parse(GUEST + text, default_name="legs", overrides=overrides)


def test_without_legs_the_guest_goes_to_b_once_as_migration_says():
    asked = scenario('[migration]\nskip = "hint"\nbandwidth = "1MiB/s"\n')
    (leg,) = asked.legs
    assert (leg.to, leg.skip, leg.bandwidth, leg.settle) == ("b", "hint", 1 << 20, None)
    assert asked.leg == ()
    assert asked.origins == ("source", "dest")


def test_a_leg_says_only_what_differs_from_migration():
    legs = scenario('[migration]\nskip = "hint"\nrounds_max = 7\n' + THERE_AND_BACK).legs
    assert [(leg.to, leg.skip, leg.rounds_max) for leg in legs] == [
        ("b", "hint", 7), ("a", "zero", 7), ("c", "hint", 7),
    ]  # fmt: skip
    assert legs[2].settle == 50


def test_a_third_host_is_started_only_where_a_leg_names_it():
    assert scenario(THERE_AND_BACK).origins == ("source", "dest", "third")
    assert scenario('[[leg]]\nto = "b"\n').origins == ("source", "dest")


def test_a_scenario_with_legs_is_read_back_from_its_manifest_as_it_was():
    asked = scenario('[migration]\nskip = "hint"\n' + THERE_AND_BACK)
    assert Scenario.model_validate(asked.model_dump(mode="json")) == asked


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[[leg]]\nto = "a"\n', "leg.0.to: the guest is on a then"),
        ('[[leg]]\nto = "b"\n[[leg]]\nto = "b"\n', "leg.1.to: the guest is on b then"),
        ('[[leg]]\nto = "d"\n', "leg.0.to: 'd' is not one of"),
        ('[[leg]]\nskip = "hint"\n', "leg.0.to: is missing"),
        ('[[leg]]\nto = "b"\nskipp = "hint"\n', "leg.0.skipp: unknown key; did you mean 'skip'?"),
        ('[[leg]]\nto = "b"\nrehearsal = true\n', "leg.0.rehearsal: a rehearsal goes nowhere"),
        ('[[leg]]\nto = "b"\ntracker = "hash"\n', "leg.0.tracker: 'hash' cannot be combined"),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(text, problem):
    with pytest.raises(UsageError, match="leg") as caught:
        scenario(text)
    assert any(line.startswith(problem) for line in caught.value.problems), caught.value.problems


def test_an_override_reaches_one_leg():
    assert scenario(THERE_AND_BACK, "leg.1.skip=none").legs[1].skip == "none"


@pytest.mark.parametrize("what", ["dest_node", "container"])
def test_a_leg_knows_that_its_giver_was_killed_whatever_the_fault_calls_it(what):
    """The second leg goes from b to a: the node that sends is "dest_node" in [[fault]]."""
    parameters = {"what": what, "restart": True}
    killed = Event(5, "testbed", "fault_applied", {"kind": "kill", "host": "dest", "parameters": parameters})
    ended = Event(9, "dest", "migration_ended", {"outcome": "completed"})

    def of_leg(giver, taker):
        seen = tuple(_renamed(event, {giver: "source", taker: "dest"}) for event in (killed, ended))
        return RunRecord(None, {}, scenario(THERE_AND_BACK), seen)

    assert of_leg("dest", "source").sender_was_killed
    assert not of_leg("source", "dest").sender_was_killed


def test_a_leg_knows_what_began_before_it_and_went_on(tmp_path):
    """The run's networks, and a fault that nobody has healed by then."""
    fault = {"fault": 0, "kind": "duplicate", "host": "dest"}
    events = (
        Event(1, "testbed", "network_made", {"network": "n"}),
        Event(2, "testbed", "network_made", {"network": "n"}),
        Event(3, "testbed", "leg_started", {"leg": 1, "giver": "source", "taker": "dest"}),
        Event(4, "testbed", "migration_requested", {}),
        Event(5, "source", "migration_ended", {"outcome": "completed"}),
        Event(6, "testbed", "fault_applied", fault),
        Event(7, "testbed", "leg_started", {"leg": 2, "giver": "dest", "taker": "source"}),
        Event(8, "testbed", "migration_requested", {}),
        Event(9, "testbed", "fault_healed", fault),
        Event(10, "dest", "migration_ended", {"outcome": "completed"}),
        Event(11, "testbed", "leg_started", {"leg": 3, "giver": "source", "taker": "third"}),
        Event(12, "testbed", "migration_requested", {}),
    )
    legs = legs_of(RunRecord(RunDir(tmp_path), {}, scenario(THERE_AND_BACK), events))
    assert [leg.networks for leg in legs] == [2, 2, 2]
    assert [leg.was_in_force("duplicate") for leg in legs] == [False, True, False]
    assert not any(leg.was_in_force("loss") for leg in legs)
