"""A destination whose journal cannot be written: the call fails, nothing is wedged, and the next try goes on."""

import sqlite3

import pytest

from dest_node.intake import NOTICE_S, SILENCE_S
from dest_node.outcomes import IntakeRefused
from host.errors import AgentLost
from migration.dest_phases import DestPhase
from migration.errors import RemoteProtocolError
from migration.events import Answer
from migration.identity import AttemptKey
from source_node.destination import KEEPALIVE_MS
from tests.core.intake_bed import KEY, PAGES, Bed

LATER = AttemptKey("m", 2, 1)


@pytest.fixture(name="bed")
def fixture_bed(tmp_path):
    bed = Bed(tmp_path)
    bed.intake.recover_guest()
    yield bed
    bed.close()


def full(monkeypatch, bed, *, written=False):
    """The disk is full; with `written` the state is there although the write failed."""
    move = bed.journal.move

    def fails(*arguments, **fields):
        if written:
            move(*arguments, **fields)
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(bed.journal, "move", fails)
    monkeypatch.setattr(bed.journal, "begin", fails)


def refused(call, *arguments):
    with pytest.raises(IntakeRefused, match=r"disk is full.*ask again"):
        call(*arguments)


@pytest.mark.parametrize("written", [False, True])
def test_a_commit_that_could_not_be_recorded_can_be_asked_again_and_nothing_else_can_happen(
    bed, monkeypatch, written
):
    digest = bed.prepared()
    with monkeypatch.context() as broken:
        full(broken, bed, written=written)
        refused(bed.intake.commit, KEY, digest)
        refused(bed.intake.commit, KEY, digest)
        assert "run" not in bed.agent.told
    with pytest.raises(RemoteProtocolError, match="RECORDING_COMMITTED"):
        bed.intake.abort(KEY, "it may be COMMITTED all the same")
    with pytest.raises(RemoteProtocolError, match="is not the prepared image's"):
        bed.intake.commit(KEY, digest ^ 1)
    assert bed.intake.commit(KEY, digest).answer is Answer.COMMITTED
    assert bed.journal.get(KEY, "dest").state == "COMMITTED"
    assert bed.agent.state == "running"


def test_an_open_that_could_not_be_recorded_leaves_room_for_the_next(bed, monkeypatch):
    with monkeypatch.context() as broken:
        full(broken, bed)
        refused(bed.open)
        assert bed.intake._machine.phase is DestPhase.IDLE
    assert bed.open()
    assert bed.open(LATER), "and a retry finds its way as ever"


def test_a_prepare_that_could_not_be_recorded_ends_its_attempt(bed, monkeypatch):
    bed.open()
    bed.store()
    with monkeypatch.context() as broken:
        full(broken, bed)
        refused(bed.prepare)
        assert bed.agent.told == ["restore", "discard"]
        refused(bed.intake.abort, KEY, "give it up")
    assert bed.intake.abort(KEY, "give it up").answer is Answer.ABORTED
    assert bed.journal.get(KEY, "dest").state == "ABORTED"


@pytest.mark.parametrize("call", ["commit", "prepare", "open"])
def test_an_abort_that_could_not_be_recorded_is_recorded_by_whatever_comes_next(bed, monkeypatch, call):
    digest = bed.prepared()
    with monkeypatch.context() as broken:
        full(broken, bed)
        refused(bed.intake.abort, KEY, "enough")
        assert bed.agent.state == "standby"
    if call == "open":
        assert bed.open(LATER)
        assert bed.intake._machine.key == LATER
    elif call == "commit":
        assert bed.intake.commit(KEY, digest).answer is Answer.ABORTED
    else:
        assert bed.prepare(digest=digest).answer is Answer.ABORTED
    assert bed.journal.get(KEY, "dest").state == "ABORTED"


@pytest.mark.parametrize("forgotten", [True, False])
def test_an_agent_that_did_not_hear_that_its_image_is_dropped_hears_it_before_the_next_attempt(
    bed, monkeypatch, forgotten
):
    bed.prepared()

    def silent():
        raise AgentLost("no answer")

    with monkeypatch.context() as broken:
        broken.setattr(bed.agent, "discard", silent)
        bed.intake.abort(KEY, "enough")
        assert bed.agent.state == "restored"
        if forgotten:
            bed.intake.forget(KEY)
        else:
            full(broken, bed)
            refused(bed.open, LATER)
        assert bed.intake._machine.phase is DestPhase.IDLE
        with pytest.raises(IntakeRefused, match="is restored, not standby"):
            bed.open(LATER)
        assert bed.events.fields["discard_unheard"] == {"reason": "no answer"}
    bed.prepared(AttemptKey("later still", 1, 1))
    assert bed.agent.told == ["restore", "discard", "restore"]


def test_the_same_attempt_of_another_epoch_is_refused_and_wedges_nothing(bed):
    bed.open()
    bed.intake.abort(KEY, "enough")
    with pytest.raises(IntakeRefused, match="was ABORTED here before"):
        bed.open(AttemptKey(KEY.migration, KEY.attempt, 2))
    assert bed.open(AttemptKey("other", 1, 9))


def test_a_destination_waits_longer_than_the_source_that_noticed_the_loss_later(bed):
    bed.open(link_timeout_ms=20_000)
    assert bed.intake._silence_s == 20 + NOTICE_S
    assert NOTICE_S >= 2 * KEEPALIVE_MS / 1000
    bed.intake.abort(KEY, "enough")
    bed.open(LATER)
    assert bed.intake._silence_s == SILENCE_S


class TestReadBack:
    """What was read back, for a judge: it outlives this process, and is of no other attempt."""

    def kept(self, bed):
        path = bed.artefacts / "dest_hashes"
        return path.stat().st_size if path.exists() else None

    def test_a_process_that_dies_after_prepared_or_committed_leaves_it_to_the_next(self, bed):
        digest = bed.prepared()
        assert self.kept(bed) is None, "nothing happened yet"
        bed.agent.take_ram = lambda: pytest.fail("it died before")
        bed.journal.move(KEY, "dest", {"PREPARED"}, "COMMITTED")
        bed = bed.restarted()
        bed.intake.recover_guest()
        assert self.kept(bed) == 8 * PAGES
        assert bed.intake.commit(KEY, digest).answer is Answer.COMMITTED

    def test_a_guest_that_was_taken_over_has_its_own(self, bed):
        bed.intake.commit(KEY, bed.prepared())
        bed.close()
        assert self.kept(bed) == 8 * PAGES

    def test_what_an_earlier_leg_left_is_gone_when_a_new_one_begins(self, bed):
        (bed.artefacts / "dest_hashes").write_bytes(b"of an earlier leg")
        bed.prepared(integrity="stream")
        assert self.kept(bed) is None

    def test_an_attempt_that_was_given_up_leaves_nothing(self, bed):
        bed.prepared()
        bed.intake.abort(KEY, "enough")
        assert list(bed.artefacts.iterdir()) == []

    def test_a_restart_that_gives_an_attempt_up_leaves_nothing_either(self, bed):
        bed.prepared()
        bed = bed.restarted()
        assert list(bed.artefacts.iterdir()) == []

    def test_a_rehearsal_leaves_its_own(self, bed):
        bed.open()
        bed.store()
        assert bed.prepare(rehearsal=True).answer is Answer.VERIFIED
        assert self.kept(bed) == 8 * PAGES


def test_an_open_where_a_guest_runs_is_told_so(bed):
    bed.intake.commit(KEY, bed.prepared())
    bed.close()
    with pytest.raises(RemoteProtocolError, match="not possible in phase COMMITTED"):
        bed.open(AttemptKey("other", 1, 1))


def test_a_guest_whose_agent_was_started_again_empty_is_known_to_be_gone(bed):
    digest = bed.prepared()
    confirmed = bed.agent.hello

    def dies_after_confirming():
        hello = confirmed()
        bed.agent.state = "standby"
        return hello

    bed.agent.hello = dies_after_confirming
    assert bed.intake.commit(KEY, digest).answer is Answer.COMMITTED
    assert "guest_lost" in bed.events.names
