"""What a restarted node makes of a journal with several legs of one guest in it."""

import pytest

from dest_node.recovery import committed_image, last_given_epoch
from host.agent_link import Hello
from host.journal import Entry
from migration.identity import AttemptKey
from source_node.recovery import given_away_by, to_take_up, turned_back


def entry(role, state, epoch, attempt=1):
    return Entry(AttemptKey(f"leg{epoch}", attempt, epoch), role, state, 255, "", 0)


def hello(state, epoch):
    return Hello(1, "ballast", state, epoch, 64, 0, 0, 0, False, 0, {}, 1, True)


def test_a_guest_that_came_back_may_run_whatever_was_given_away_before():
    legs = [entry("source", "COMPLETED", 1)]
    assert given_away_by(legs, 3) is None
    assert given_away_by(legs, 1) == legs[0]


def test_a_guest_given_away_stays_given_away_though_a_newer_leg_turned_back():
    """Its agent still holds epoch 1, frozen; the journal goes on with attempts of the guest that came back."""
    legs = [entry("source", "COMPLETED", 1), entry("source", "ABORTED", 3)]
    assert given_away_by(legs, 1) == legs[0]
    assert turned_back(legs, 1) is None
    assert turned_back(legs, 3) == legs[1]


def test_an_attempt_that_was_retried_well_is_not_turned_back():
    legs = [entry("source", "ABORTED", 3), entry("source", "COMPLETED", 3, attempt=2)]
    assert turned_back(legs, 3) is None
    assert given_away_by(legs, 3) == legs[1]


def test_what_is_committing_is_asked_about_wherever_it_stands():
    legs = [entry("source", "COMPLETED", 1), entry("source", "COMMITTING", 3), entry("source", "ABORTED", 5)]
    assert to_take_up(legs) == legs[1]
    assert to_take_up(legs[:1]) is None


def test_an_image_is_run_only_for_the_attempt_of_its_own_epoch():
    """Leg 1's row was never forgotten, and leg 3 was prepared when the node died: its image is not leg 1's."""
    legs = [entry("dest", "COMMITTED", 1), entry("dest", "ABORTED", 3)]
    assert committed_image(legs, hello("restored", 3)) is None
    assert committed_image(legs, hello("restored", 1)) == legs[0]
    assert committed_image(legs, hello("running", 2)) == legs[0]


@pytest.mark.parametrize("state", ["frozen", "standby", "paused"])
def test_nothing_is_run_that_does_not_wait_to_be(state):
    assert committed_image([entry("dest", "COMMITTED", 1)], hello(state, 1)) is None


def test_the_last_epoch_given_away_outlives_the_node():
    assert last_given_epoch([]) == 0
    legs = [entry("source", "COMPLETED", 3), entry("source", "COMPLETED", 1), entry("source", "ABORTED", 5)]
    assert last_given_epoch(legs) == 3
