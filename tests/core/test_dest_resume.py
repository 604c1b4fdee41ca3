"""A destination whose source lost its connection: it waits, joins, goes on, or gives up (DESIGN 3.4)."""

import threading

import numpy as np
import pytest

from dest_node.page_receiver import PageReceiver
from host.guest_memory import HostRam
from migration import commands as do
from migration import events as told
from migration.codec import ChunkHeader, encode_chunk, page_hashes
from migration.dest_machine import DestMachine
from migration.dest_phases import RESUMABLE_PHASES, DestPhase
from migration.errors import LocalProtocolError, RemoteProtocolError
from migration.identity import AttemptKey
from migration.pages import PAGE_BYTES
from migration.testing import MachinePair

KEY = AttemptKey("m", 1, 1)


def receiving(*, link_timeout_ms=10_000):
    pair = MachinePair(8)
    pair.drive_dest(told.OpenRequested(KEY, 8, link_timeout_ms=link_timeout_ms))
    return pair


def test_a_lost_link_waits_for_its_source_and_goes_on_with_the_same_memory():
    pair = receiving()
    pair.dest.memory[3] = 4711
    pair.drive_dest(told.StreamBroken("cut"))
    pair.drive_dest(told.StreamBroken("and another stream of it"))
    assert pair.dest_machine.phase is DestPhase.LINK_LOST
    pair.drive_dest(told.OpenRequested(KEY, 8, resume=True))
    assert pair.dest_machine.phase is DestPhase.RECEIVING
    assert pair.dest.memory[3] == 4711
    assert pair.dest.journal == ["RECEIVING"]


def test_streams_are_joined_before_a_resume_is_answered_also_where_nobody_noticed_the_loss():
    machine = receiving().dest_machine
    assert machine.handle(told.OpenRequested(KEY, 8, resume=True)) == [do.JoinStreams()]
    assert [type(command) for command in machine.handle(told.StreamsJoined())] == [do.Note, do.Reply]


def test_a_writer_that_does_not_end_ends_the_attempt_instead_of_resuming_it():
    machine = receiving().dest_machine
    machine.handle(told.OpenRequested(KEY, 8, resume=True))
    commands = machine.handle(told.IntakeFailed("it does not end"))
    assert do.DiscardImage("it does not end") in commands
    assert machine.phase is DestPhase.ABORTING


@pytest.mark.parametrize("lost", [True, False])
def test_whoever_stays_silent_beyond_the_link_timeout_has_given_up(lost):
    pair = receiving()
    if lost:
        pair.drive_dest(told.StreamBroken("cut"))
    pair.drive_dest(told.IntakeFailed("silent for 10 s"))
    assert pair.dest_machine.phase is DestPhase.ABORTED
    assert not pair.dest.memory.any()
    with pytest.raises(RemoteProtocolError, match=r"ABORTED here: silent for 10 s"):
        pair.drive_dest(told.OpenRequested(KEY, 8, resume=True))


def test_without_a_link_timeout_a_lost_link_ends_the_attempt():
    pair = receiving(link_timeout_ms=0)
    pair.drive_dest(told.StreamBroken("cut"))
    assert pair.dest_machine.phase is DestPhase.ABORTED


def test_a_refused_chunk_ends_the_attempt_whatever_the_link_timeout():
    pair = receiving()
    pair.drive_dest(told.IntakeFailed("bad page chunk"))
    assert pair.dest_machine.phase is DestPhase.ABORTED


@pytest.mark.parametrize("other", [AttemptKey("m", 2, 1), AttemptKey("m", 1, 2), AttemptKey("x", 1, 1)])
def test_only_the_attempt_at_hand_can_be_resumed(other):
    pair = receiving()
    with pytest.raises(RemoteProtocolError, match="nothing of it is left here"):
        pair.drive_dest(told.OpenRequested(other, 8, resume=True))
    assert pair.dest_machine.phase is DestPhase.RECEIVING
    with pytest.raises(RemoteProtocolError, match="nothing of it is left here"):
        DestMachine().handle(told.OpenRequested(KEY, 8, resume=True))


@pytest.mark.parametrize("phase", sorted(set(DestPhase) - RESUMABLE_PHASES, key=lambda p: p.value))
def test_no_other_phase_can_be_resumed_and_the_line_names_it(phase):
    machine = receiving().dest_machine
    machine.phase = phase
    with pytest.raises(RemoteProtocolError, match=f"it is {phase.name} here"):
        machine.handle(told.OpenRequested(KEY, 8, resume=True))


def test_a_retry_after_a_lost_link_starts_from_known_zero():
    pair = receiving()
    pair.dest.memory[3] = 4711
    pair.drive_dest(told.StreamBroken("cut"))
    pair.drive_dest(told.OpenRequested(AttemptKey("m", 2, 1), 8))
    assert pair.dest_machine.phase is DestPhase.RECEIVING
    assert not pair.dest.memory.any()
    assert pair.dest.journal == ["RECEIVING", "ABORTED", "RECEIVING"]


def test_a_lost_link_is_kept_for_its_source_not_given_to_another_migration():
    pair = receiving()
    pair.drive_dest(told.StreamBroken("cut"))
    with pytest.raises(RemoteProtocolError, match="must wait"):
        pair.drive_dest(told.OpenRequested(AttemptKey("other", 1, 1), 8, idle=True))


def test_prepare_may_come_when_the_streams_broke_after_their_last_page():
    pair = receiving()
    pair.drive_dest(told.StreamBroken("cut"))
    reply = pair.drive_dest(told.PrepareRequested(KEY, "one", pair.digest(), 0))
    assert reply.answer is told.Answer.PREPARED
    again = pair.drive_dest(told.PrepareRequested(KEY, "one", pair.digest(), 0))
    assert again.answer is told.Answer.PREPARED


def test_another_size_is_another_guest():
    pair = receiving()
    with pytest.raises(RemoteProtocolError, match="opened with 8 bytes"):
        pair.drive_dest(told.OpenRequested(KEY, 16, resume=True))


def test_an_open_that_is_repeated_is_no_resume_once_the_link_was_lost():
    """What was on the way is lost: the same memory would miss it. And one that stands finds what it had."""
    pair = receiving()
    pair.dest.memory[3] = 4711
    pair.drive_dest(told.OpenRequested(KEY, 8))
    assert pair.dest.memory[3] == 4711
    pair.drive_dest(told.StreamBroken("cut"))
    with pytest.raises(RemoteProtocolError, match=r"LINK_LOST here; .* must wait"):
        pair.drive_dest(told.OpenRequested(KEY, 8))
    assert pair.dest_machine.phase is DestPhase.LINK_LOST


@pytest.fixture
def receiver():
    receiver = PageReceiver(HostRam.create(8 * PAGE_BYTES), attempt=1)
    yield receiver
    receiver.ram.close()


def chunk(receiver, sequence, pfn, fill):
    data = bytes([fill]) * PAGE_BYTES
    return encode_chunk(
        ChunkHeader(receiver.incarnation, attempt=1, round_index=1, sequence=sequence),
        run_first=np.array([pfn], np.uint64), run_pages=np.array([1], np.uint32),
        zero_first=np.empty(0, np.uint64), zero_pages=np.empty(0, np.uint32),
        hashes=page_hashes(data), data=data,
    )  # fmt: skip


def test_a_late_chunk_of_a_joined_stream_is_never_stored_and_the_next_stream_goes_on_where_it_ended(receiver):
    cut = threading.Event()
    old = receiver.begin_stream(cut.set)
    receiver.store(old, chunk(receiver, 0, pfn=3, fill=1))
    assert receiver.join_streams(1.0)
    assert cut.is_set()
    assert receiver.stored_below == [1]
    new = receiver.begin_stream(lambda: None)
    with pytest.raises(RemoteProtocolError, match="given up"):
        receiver.store(old, chunk(receiver, 1, pfn=3, fill=2))
    receiver.end_stream(old)  # late as well: the new one stays open
    assert receiver.streaming
    receiver.store(new, chunk(receiver, 1, pfn=4, fill=3))
    assert [receiver.ram.pages_view[pfn][0] for pfn in (3, 4)] == [1, 3]


def test_a_store_that_does_not_end_is_no_joined_stream(receiver):
    receiver.begin_stream(lambda: None)
    with receiver._lanes[0].storing:
        assert not receiver.join_streams(0.01)


class TestGivenAway:
    """A destination whose guest left again: what may come in, and what is over."""

    def gave_away(self):
        pair = MachinePair(8)
        assert pair.run() == "completed"
        pair.dest_machine.handle(told.GuestGivenAway(pair.key.next_epoch))
        pair.guest.running_at, pair.dest.running = "nobody", False
        return pair

    def test_it_takes_the_same_guest_in_again_at_a_later_epoch(self):
        pair = self.gave_away()
        assert pair.dest_machine.phase is DestPhase.IDLE
        pair.drive_dest(told.OpenRequested(AttemptKey("back", 1, 3), 8))
        assert pair.dest_machine.phase is DestPhase.RECEIVING

    @pytest.mark.parametrize("epoch", [1, 2])
    def test_what_an_older_leg_still_says_means_nothing(self, epoch):
        pair = self.gave_away()
        for key in (pair.key, AttemptKey("m", 7, epoch), AttemptKey("unheard of", 1, epoch)):
            old = AttemptKey(key.migration, key.attempt, epoch)
            with pytest.raises(RemoteProtocolError, match="gave the guest away at epoch 2"):
                pair.drive_dest(told.OpenRequested(old, 8))
            for call in (told.CommitRequested(old, 1), told.AbortRequested(old, "x")):
                assert pair.drive_dest(call).answer is told.Answer.UNKNOWN

    def test_what_was_given_away_later_counts_whatever_is_told_after_it(self):
        pair = self.gave_away()
        pair.dest_machine.handle(told.GuestGivenAway(1))
        with pytest.raises(RemoteProtocolError, match="gave the guest away at epoch 2"):
            pair.drive_dest(told.OpenRequested(AttemptKey("m", 7, 2), 8))

    def test_a_guest_that_runs_here_is_not_forgotten_for_one_that_left_earlier(self):
        pair = MachinePair(8)
        pair.run()
        with pytest.raises(LocalProtocolError):
            pair.dest_machine.handle(told.GuestGivenAway(1))
        assert pair.dest_machine.phase is DestPhase.COMMITTED

    @pytest.mark.parametrize("phase", [DestPhase.RECEIVING, DestPhase.PREPARED, DestPhase.STARTING])
    def test_nothing_is_forgotten_while_a_guest_is_coming(self, phase):
        machine = DestMachine()
        machine.phase = phase
        with pytest.raises(LocalProtocolError):
            machine.handle(told.GuestGivenAway(5))
