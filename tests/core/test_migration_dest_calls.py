"""The destination's machine: calls that come twice, late, or about something else."""

from dataclasses import replace

import pytest

from migration import commands as do
from migration import events as told
from migration.dest_phases import TRANSITIONS, DestPhase
from migration.errors import RemoteProtocolError
from migration.identity import AttemptKey
from migration.source_phases import SourcePhase
from migration.testing import MachinePair

KEY = AttemptKey("m", 1, 1)


def test_another_attempts_calls_are_answered_unknown():
    pair = MachinePair(8)
    pair.run()
    other = AttemptKey("m", 2, 1)
    for call in (told.CommitRequested(other, 1), told.AbortRequested(other, "x")):
        assert pair.drive_dest(call).answer is told.Answer.UNKNOWN


def test_a_replayed_commit_is_committed_and_runs_nothing_again():
    pair = MachinePair(8)
    pair.run()
    pair.guest.running_at = "dest"
    assert pair.drive_dest(told.CommitRequested(pair.key, pair.digest())).answer is told.Answer.COMMITTED


def test_a_commit_of_another_image_is_refused():
    pair = MachinePair(8)
    pair.run()
    with pytest.raises(RemoteProtocolError):
        pair.drive_dest(told.CommitRequested(pair.key, pair.digest() ^ 1))


def test_prepare_may_be_asked_again_and_not_about_another_image():
    pair = MachinePair(8)
    pair.run_until_commit_is_sent()
    with pytest.raises(RemoteProtocolError, match="not the prepared image's"):
        pair.drive_dest(told.PrepareRequested(pair.key, "one", pair.digest() ^ 1, pair.dest.chunks))
    again = told.PrepareRequested(pair.key, "one", pair.digest(), pair.dest.chunks)
    assert pair.drive_dest(again).answer is told.Answer.PREPARED


def test_a_prepared_attempt_is_not_given_up_for_itself():
    pair = MachinePair(8)
    pair.run_until_commit_is_sent()
    with pytest.raises(RemoteProtocolError, match=r"PREPARED here; .* must wait"):
        pair.drive_dest(told.OpenRequested(pair.key, 8))
    assert pair.drive_dest(told.CommitRequested(pair.key, pair.digest())).answer is told.Answer.COMMITTED


def test_a_guest_that_does_not_run_yet_is_not_started_for_another_image():
    pair = MachinePair(8)
    pair.run_until_commit_is_sent()
    pair.dest_starts_fail = 1
    pair.drive_dest(told.CommitRequested(pair.key, pair.digest()))
    assert pair.dest_machine.phase is DestPhase.STARTING
    with pytest.raises(RemoteProtocolError, match="not the prepared image's"):
        pair.drive_dest(told.CommitRequested(pair.key, pair.digest() ^ 1))
    assert not pair.dest.running


def test_an_attempt_that_waited_for_a_record_that_failed_does_not_begin_by_itself_later():
    """Its Open was answered with the failure; whoever asked may have gone elsewhere since."""
    machine = MachinePair(8).dest_machine
    machine.handle(told.OpenRequested(KEY, 8))
    machine.handle(told.StateRecorded(told.Recorded.RECEIVING))
    later = AttemptKey("m", 2, 1)
    machine.handle(told.OpenRequested(later, 8))
    (reply,) = machine.handle(told.StateNotRecorded("the disk is full"))
    assert (reply.answer, reply.reason) == (told.Answer.UNKNOWN, "the disk is full")
    (record,) = machine.handle(told.AbortRequested(KEY, "enough"))
    assert (record.key, record.state) == (KEY, told.Recorded.ABORTED)
    machine.handle(told.StateRecorded(told.Recorded.ABORTED))
    assert (machine.phase, machine.key) == (DestPhase.ABORTED, KEY)


def test_abort_after_committed_changes_nothing():
    pair = MachinePair(8)
    pair.run()
    assert pair.drive_dest(told.AbortRequested(pair.key, "no")).answer is told.Answer.COMMITTED
    assert pair.dest.running


def test_an_aborted_attempt_stays_aborted():
    def cancel(pair, _command):
        if pair.source.phase is SourcePhase.SENDING and not pair.events:
            pair.events.append(told.CancelRequested("x"))

    pair = MachinePair(8, before=cancel)
    assert pair.run() == "cancelled"
    assert pair.drive_dest(told.CommitRequested(pair.key, 1)).answer is told.Answer.ABORTED
    assert pair.drive_dest(told.PrepareRequested(pair.key, "one", 1, 1)).answer is told.Answer.ABORTED
    with pytest.raises(RemoteProtocolError):
        pair.drive_dest(told.OpenRequested(pair.key, 8))


def test_a_rehearsed_attempt_cannot_be_prepared_or_committed_afterwards():
    pair = MachinePair(8, rehearsal=True)

    def never_told(pair, command):
        pair.link_up = not isinstance(command, do.ForgetDestination)

    pair._before = never_told
    assert pair.run() == "rehearsal"
    digest = pair.digest()
    assert pair.drive_dest(told.CommitRequested(pair.key, digest)).answer is told.Answer.ABORTED
    again = told.PrepareRequested(pair.key, "one", digest, pair.dest.chunks)
    assert pair.drive_dest(again).answer is told.Answer.ABORTED


def test_a_verified_rehearsal_says_so_again_to_the_same_question_and_to_no_other():
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(KEY, 8))
    asked = told.PrepareRequested(KEY, "one", pair.digest(), 0, rehearsal=True)
    assert pair.drive_dest(asked).answer is told.Answer.VERIFIED
    assert pair.drive_dest(asked).answer is told.Answer.VERIFIED
    for other in (replace(asked, rehearsal=False), replace(asked, image_digest=asked.image_digest ^ 1)):
        assert pair.drive_dest(other).answer is told.Answer.ABORTED
    later = replace(KEY, attempt=2)
    pair.drive_dest(told.OpenRequested(later, 8))
    pair.drive_dest(told.AbortRequested(later, "given up"))
    assert pair.drive_dest(replace(asked, key=later)).answer is told.Answer.ABORTED
    assert pair.dest.journal == ["RECEIVING", "ABORTED"] * 2


def test_a_prepared_attempt_is_no_rehearsal_afterwards():
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(KEY, 8))
    pair.drive_dest(told.PrepareRequested(KEY, "one", pair.digest(), 0))
    with pytest.raises(RemoteProtocolError, match="no rehearsal"):
        pair.drive_dest(told.PrepareRequested(KEY, "one", pair.digest(), 0, rehearsal=True))


def test_a_later_attempt_of_the_same_migration_replaces_even_a_prepared_one():
    pair = MachinePair(8)
    pair.run_until_commit_is_sent()
    assert pair.dest_machine.phase is DestPhase.PREPARED
    pair.drive_dest(told.OpenRequested(AttemptKey("m", 2, 1), 8))
    assert pair.dest_machine.phase is DestPhase.RECEIVING
    assert pair.drive_dest(told.CommitRequested(pair.key, 1)).answer is told.Answer.UNKNOWN


@pytest.mark.parametrize("idle", [True, False])
def test_another_migration_comes_in_only_where_nobody_sends(idle):
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(AttemptKey("zzz", 1, 1), 8))
    other = told.OpenRequested(AttemptKey("aaa", 1, 1), 8, idle=idle)
    if idle:
        pair.drive_dest(other)
        assert pair.dest_machine.key == other.key
    else:
        with pytest.raises(RemoteProtocolError):
            pair.drive_dest(other)


def test_an_older_attempt_cannot_replace_a_newer_one():
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(AttemptKey("m", 3, 1), 8))
    with pytest.raises(RemoteProtocolError):
        pair.drive_dest(told.OpenRequested(AttemptKey("m", 2, 1), 8))


def test_a_second_guest_is_not_taken_in_where_one_runs():
    pair = MachinePair(8)
    pair.run()
    with pytest.raises(RemoteProtocolError):
        pair.drive_dest(told.OpenRequested(AttemptKey("other", 1, 1), 8))


def test_the_source_that_leaves_before_prepare_leaves_an_aborted_attempt():
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(KEY, 8))
    pair.drive_dest(told.StreamBroken("cut"))
    assert pair.dest_machine.phase is DestPhase.ABORTED
    assert not pair.dest.memory.any()


def test_every_phase_of_the_destination_can_be_reached():
    targets = {t for row in TRANSITIONS.values() for reached in row.values() for t in reached}
    assert targets | {DestPhase.IDLE} == set(DestPhase)
