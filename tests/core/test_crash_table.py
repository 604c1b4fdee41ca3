"""The table of crashes is complete, and agrees with the rules of ownership that it is written down from."""

import pytest

from host.points import DEST_POINTS, SOURCE_POINTS
from testbed.crashes.table import CELLS, CRASHES, HEARD_AT, OUTCOMES, Cell, cell_named
from testbed.errors import UsageError

WAY = list(OUTCOMES)


def after(point):
    """Whether a cell's point lies at or behind this one."""
    return lambda cell: WAY.index(cell.point) >= WAY.index(point) and cell.point != "aborted.recorded"


def test_every_point_has_a_cell_for_every_crash():
    assert {*SOURCE_POINTS, *DEST_POINTS} <= set(OUTCOMES)
    assert len(CELLS) == len(OUTCOMES) * len(CRASHES) == len({cell.name for cell in CELLS})
    assert all(cell_named(cell.name) == cell for cell in CELLS)


def test_nothing_completes_before_committing_but_what_had_not_begun():
    early = [cell for cell in CELLS if not after("committing.recorded")(cell)]
    assert [cell.name for cell in early if cell.outcome == "completed"] == ["started.recorded/dest"]


def test_once_committing_is_recorded_only_a_destination_that_forgot_its_image_gives_the_guest_back():
    late = [cell for cell in CELLS if after("committing.recorded")(cell)]
    back = {cell for cell in late if cell.outcome == "failed"}
    assert back == {
        cell for cell in late if not after("committed.recorded")(cell) and "dest" in cell.nodes_killed
    }


def test_a_guest_is_lost_only_with_the_process_that_alone_could_run_it():
    lost = {cell for cell in CELLS if cell.outcome == "guest_lost"}
    assert {cell.crash for cell in lost} == {"guest"}
    spared = {cell.point for cell in CELLS if cell.crash == "guest"} - {cell.point for cell in lost}
    assert spared == {"committing.recorded", "commit.sent", "commit.received"}


def test_a_message_that_is_under_way_has_reached_its_destination_and_done_nothing():
    assert set(HEARD_AT) == {point for point in SOURCE_POINTS if point.endswith(".sent")}
    assert set(HEARD_AT.values()) <= set(DEST_POINTS)


def test_whose_process_is_killed():
    assert Cell("commit.sent", "both").nodes_killed == ("source", "dest")
    assert Cell("commit.sent", "guest").nodes_killed == ()
    assert Cell("commit.received", "guest").guest_host == "source"
    assert Cell("committed.recorded", "guest").guest_host == "dest"
    assert (Cell("round 1 50%", "link").side, Cell("guest.run", "link").side) == ("source", "dest")


def test_a_cell_that_does_not_exist_is_told_which_was_meant_and_how_to_see_all():
    with pytest.raises(UsageError) as refused:
        cell_named("comit.sent/dest")
    assert str(refused.value) == (
        "there is no crash 'comit.sent/dest': `ballast soak --cell list` names them; "
        "did you mean 'commit.sent/dest'?"
    )
    with pytest.raises(UsageError, match=r"^there is no crash '12': .* names them$"):
        cell_named("12")
