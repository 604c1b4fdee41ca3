"""A destination that was started again: COMMITTED is said, and forgotten, only when its guest runs."""

import pytest

from dest_node.outcomes import IntakeRefused
from dest_node.recovery import aborted_image
from host.journal import Entry
from migration.events import Answer
from migration.identity import AttemptKey
from tests.core.intake_bed import KEY, Bed, StandInAgent


@pytest.fixture(name="committed")
def fixture_committed(tmp_path):
    """COMMITTED is durable, the image waits, the process was started again."""
    agent = StandInAgent("restored", KEY.guest_epoch)
    bed = Bed(tmp_path, agent)
    bed.journal.begin(KEY, "dest", "PREPARED", digest=7)
    bed.journal.move(KEY, "dest", {"PREPARED"}, "COMMITTED")
    bed = bed.restarted()
    yield bed
    bed.close()


def test_committed_is_no_answer_before_the_guest_runs(committed):
    reply = committed.intake.commit(KEY, 7)
    assert reply.answer is Answer.UNKNOWN
    assert "does not run yet" in reply.reason
    committed.intake.recover_guest()
    assert committed.agent.told == ["run"]
    assert committed.intake.commit(KEY, 7).answer is Answer.COMMITTED


def test_what_was_committed_is_not_forgotten_and_its_guest_not_thrown_away(committed):
    with pytest.raises(IntakeRefused, match="say Forget again later"):
        committed.intake.forget(KEY)
    committed.intake.recover_guest()
    assert committed.agent.told == ["run"]
    committed.intake.forget(KEY)
    assert committed.journal.entries("dest") == []


def test_an_agent_that_cannot_be_heard_leaves_it_open(committed):
    def deaf():
        raise OSError("nothing is heard")

    committed.agent.hello = deaf
    with pytest.raises(OSError, match="nothing is heard"):
        committed.intake.recover_guest()
    assert committed.intake.commit(KEY, 7).answer is Answer.UNKNOWN


def test_a_guest_that_is_gone_with_its_agent_was_committed_all_the_same(committed):
    committed.agent.state = "standby"
    committed.intake.recover_guest()
    assert committed.intake.commit(KEY, 7).answer is Answer.COMMITTED
    assert committed.agent.told == []


def test_an_image_is_thrown_away_only_where_its_attempt_was_aborted(tmp_path):
    bed = Bed(tmp_path, StandInAgent("restored", 1))
    bed.intake.recover_guest()
    assert bed.agent.told == []
    assert bed.events.names == ["image_unexplained"]
    bed.journal.begin(KEY, "dest", "PREPARED")
    bed = bed.restarted()
    assert bed.intake.abort(KEY, "too").answer is Answer.ABORTED, "an end that needs no guest is said at once"
    bed.intake.recover_guest()
    assert bed.agent.told == ["discard"]


@pytest.mark.parametrize(("state", "epoch"), [("running", 1), ("standby", 1), ("restored", 2)])
def test_what_an_aborted_attempt_did_not_leave_is_not_its_image(state, epoch):
    entry = Entry(AttemptKey("m", 1, 1), "dest", "ABORTED", None, "", 0)
    assert aborted_image([entry], StandInAgent(state, epoch).hello()) is None
