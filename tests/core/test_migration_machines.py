"""The two machines joined in memory: what must hold however an attempt ends (DESIGN 3.3, 3.4)."""

import numpy as np
import pytest

from migration import commands as do
from migration import events as told
from migration.dest_phases import DestPhase
from migration.errors import LocalProtocolError
from migration.identity import AttemptKey
from migration.page_bits import PageBits
from migration.rounds import Limits
from migration.source_machine import SourceMachine
from migration.source_phases import (
    FINAL_PHASES,
    LATE_ANSWERS,
    REVERSIBLE_PHASES,
    TRANSITIONS,
    TURNED_PHASES,
    WITHOUT_MEANING,
    SourcePhase,
)
from migration.testing import MachinePair

KEY = AttemptKey("m", 1, 1)


@pytest.mark.parametrize("skip", list(told.Skip))
def test_a_quiet_guest_arrives_whole_and_runs_once(skip):
    pair = MachinePair(64, skip=skip)
    pair.guest.free[10:30] = True
    assert pair.run() == "completed"
    used = ~pair.guest.free if skip.uses_hints else np.ones(64, bool)
    assert (pair.dest.memory[used] == pair.guest.memory[used]).all()
    assert pair.guest.running_at == "dest"
    assert pair.guest_frozen
    assert pair.source_journal == ["STARTED", "COMMITTING", "COMPLETED"]
    assert pair.dest.journal == ["RECEIVING", "PREPARED", "COMMITTED"]


def test_hinted_pages_are_never_touched_at_the_destination():
    pair = MachinePair(64, skip=told.Skip.HINT)
    pair.guest.free[10:30] = True
    pair.run()
    assert not pair.dest.named[10:30].any()
    assert pair.source.ledger.skipped_pages == 20


def test_hints_come_first_nothing_is_sent_before_the_guests_stop():
    pair = MachinePair(64, skip=told.Skip.HINT)
    pair.run()
    first_send = next(i for i, command in enumerate(pair.log) if isinstance(command, do.SendPages))
    opened = next(i for i, command in enumerate(pair.log) if isinstance(command, do.OpenHints))
    harvest_or_start = next(i for i, c in enumerate(pair.log) if isinstance(c, do.StartTracking))
    assert harvest_or_start < opened < first_send


def test_what_went_into_the_balloon_before_the_pause_is_not_sent_at_the_end(monkeypatch):
    def write_before_each_harvest(pair, command):
        if isinstance(command, do.Harvest) and pair.guest.running_at == "source":
            for pfn in (5, 6):
                pair.guest.write(pfn, 77)

    pair = MachinePair(64, before=write_before_each_harvest)
    ballooned = np.zeros(64, bool)
    ballooned[5] = True
    tell = pair.tell

    def tell_of_the_balloon(event):
        if pair.source.phase is SourcePhase.FINAL_HARVESTING and isinstance(event, told.Harvested):
            event = told.Harvested(event.dirty, PageBits.of(ballooned))
        tell(event)

    monkeypatch.setattr(pair, "tell", tell_of_the_balloon)
    assert pair.run() == "completed"
    last = [command for command in pair.log if isinstance(command, do.SendPages)][-1]
    assert last.pfns.tolist() == [6]
    assert pair.source.ledger.rounds[-1].ballooned_pages == 1


def test_a_guest_that_never_stops_its_report_delays_the_round_and_no_more():
    pair = MachinePair(64, skip=told.Skip.HINT, hints_late=True)
    pair.guest.free[10:30] = True
    assert pair.run() == "completed"
    totals = pair.source.ledger.rounds[0]
    assert totals.late_pages == 20
    assert totals.skipped_pages == 0
    assert (pair.dest.memory == pair.guest.memory).all()


def test_hazard_1_a_hinted_page_taken_back_and_written_before_the_hint_is_processed_is_sent():
    """The hint clears round 1's set only; the write is in the next harvest, so it crosses later."""

    def write_behind_the_hint(pair, command):
        if isinstance(command, do.SendPages) and command.round_index == 1 and not pair.guest.dirty[12]:
            pair.guest.write(12, 4711)

    pair = MachinePair(64, skip=told.Skip.HINT, before=write_behind_the_hint)
    pair.guest.free[10:30] = True
    assert pair.run() == "completed"
    assert pair.dest.memory[12] == 4711
    assert pair.source.ledger.rounds[0].redirtied_pages == 1


def test_hazard_2_nothing_is_harvested_while_an_id_is_open():
    pair = MachinePair(64, skip=told.Skip.HINT, limits=Limits(downtime_limit_ms=0.0))
    written = iter(range(100, 103))

    def keep_dirtying(pair, command):
        if isinstance(command, do.AwaitAcknowledgements) and pair.guest.running_at == "source":
            value = next(written, None)
            if value is not None:
                pair.guest.write(5, value)

    pair._before = keep_dirtying
    assert pair.run() == "completed"
    hint_open = False
    for command in pair.log:
        if isinstance(command, do.OpenHints):
            assert not hint_open
            hint_open = True
        elif isinstance(command, do.CloseHints):
            hint_open = False
        elif isinstance(command, do.Harvest):
            assert not hint_open, "harvested while a command id was open"
    assert pair.count(do.OpenHints) > 1
    assert pair.dest.memory[5] == 102


def test_writes_during_every_round_arrive():
    values = iter(range(1000, 1005))

    def write(pair, command):
        if isinstance(command, do.SendPages) and pair.guest.running_at == "source":
            value = next(values, None)
            if value is not None:
                pair.guest.write(7, value)
                pair.guest.write(60, value + 50)

    pair = MachinePair(64, before=write)
    assert pair.run() == "completed"
    assert (pair.dest.memory == pair.guest.memory).all()
    assert pair.dest.memory[7] == 1004


def at_phase(phase, event):
    """A hook that posts `event` as soon as the source is in `phase`."""
    done = []

    def hook(pair, command):
        if isinstance(command, do.PauseGuest):
            pair.guest.write(3, 4711)  # so that the last round has something to send
        if pair.source.phase is phase and not done:
            done.append(True)
            pair.events.appendleft(event)

    return hook


REACHED = sorted(REVERSIBLE_PHASES, key=lambda phase: phase.value)


@pytest.mark.parametrize("phase", REACHED, ids=lambda phase: phase.name)
@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (told.CancelRequested("because"), "cancelled"),
        (told.PeerLost("gone"), "failed"),
        (told.HostFailed("broken"), "failed"),
        (told.TimerFired(told.Timer.MIGRATION), "cancelled"),
    ],
    ids=["cancel", "peer_lost", "host_failed", "timeout"],
)
def test_whatever_happens_before_committing_the_guest_runs_on_at_the_source(phase, event, outcome):
    rehearsal = phase is SourcePhase.KEEPING_EVIDENCE  # a phase that only a rehearsal comes to
    pair = MachinePair(64, skip=told.Skip.HINT, before=at_phase(phase, event), rehearsal=rehearsal)
    assert pair.run() == ("rehearsal" if type(event) in WITHOUT_MEANING.get(phase, ()) else outcome)
    assert pair.guest.running_at == "source"
    assert not pair.dest.running
    assert not pair.guest_frozen
    assert pair.source_journal[-1] == "ABORTED"
    # FACTS 5, hazard 5: a guest that was asked for hints is told DONE.
    assert pair.hints_told_done == (pair.count(do.OpenHints) > 0)


def test_cancel_after_committing_does_not_bring_the_guest_back():
    pair = MachinePair(64, before=at_phase(SourcePhase.COMMITTING, told.CancelRequested("too late")))
    assert pair.run() == "completed"
    assert pair.guest.running_at == "dest"


@pytest.mark.parametrize("event", [told.CancelRequested("x"), told.PeerLost("x"), told.HostFailed("x")])
def test_bad_news_while_committing_is_being_recorded_waits_for_the_destinations_word(event):
    pair = MachinePair(64, before=at_phase(SourcePhase.RECORDING, event))
    assert pair.run() == "completed"
    assert "ABORTED" not in pair.source_journal


def test_an_unanswered_commit_is_asked_again_until_answered():
    pair = MachinePair(64)
    down = []

    def cut(pair, command):
        if isinstance(command, do.SendCommit) and len(down) < 3:
            down.append(True)
            pair.link_up = False
        elif isinstance(command, do.ArmTimer) and command.timer is told.Timer.COMMIT_RETRY:
            pair.link_up = len(down) >= 3

    pair._before = cut
    assert pair.run() == "completed"
    assert pair.count(do.SendCommit) == 4
    assert pair.count(do.ResumeGuest) == 0


def test_unknown_id_is_no_answer():
    machine_pair = MachinePair(64)
    asked = []

    def forgetful(pair, command):
        if isinstance(command, do.SendCommit) and not asked:
            asked.append(True)
            pair.events.append(told.CommitAnswered(told.Answer.UNKNOWN, "never heard of it"))
            pair.link_up = False
        elif isinstance(command, do.ArmTimer) and command.timer is told.Timer.COMMIT_RETRY:
            pair.link_up = True

    machine_pair._before = forgetful
    assert machine_pair.run() == "completed"
    assert machine_pair.count(do.ResumeGuest) == 0


def test_commit_answered_aborted_brings_the_guest_back():
    def lose_the_image(pair, command):
        if isinstance(command, do.SendCommit):
            pair.dest.restored = False

    pair = MachinePair(64, before=lose_the_image)
    assert pair.run() == "failed"
    assert pair.guest.running_at == "source"
    assert pair.dest.journal == ["RECEIVING", "PREPARED", "ABORTED"]


def test_hazard_12_a_retry_starts_from_known_zero_and_is_complete():
    first = MachinePair(64, before=at_phase(SourcePhase.FINAL_SENDING, told.CancelRequested("stop")))
    assert first.run() == "cancelled"
    second = MachinePair(64, attempt=2, guest=first.guest)
    second.dest_machine = first.dest_machine
    second.dest = first.dest
    second.dest.chunks = 0
    assert second.run() == "completed"
    assert (second.dest.memory == second.guest.memory).all()


@pytest.mark.parametrize("skip", list(told.Skip))
def test_a_rehearsal_verifies_the_whole_image_and_the_guest_goes_on_at_the_source(skip):
    pair = MachinePair(64, skip=skip, rehearsal=True)
    pair.guest.free[10:30] = True
    assert pair.run() == "rehearsal"
    used = ~pair.guest.free if skip.uses_hints else np.ones(64, bool)
    assert (pair.dest.evidence[used] == pair.guest.memory[used]).all()
    assert pair.guest.running_at == "source"
    assert pair.hints_told_done == skip.uses_hints


def test_a_rehearsal_gives_nothing_away_not_even_on_paper():
    pair = MachinePair(64, rehearsal=True)
    pair.run()
    assert pair.source_journal == ["STARTED", "ABORTED"]
    assert pair.dest.journal == ["RECEIVING", "ABORTED"]
    assert not pair.dest.restored
    assert not pair.guest_frozen
    assert pair.count(do.SendCommit) == 0
    assert not pair.dest.memory.any(), "the destination kept a copy"
    assert pair.dest_machine.phase is DestPhase.IDLE, "ready for the next guest"


def test_the_source_keeps_its_evidence_before_the_rehearsed_guest_runs_on():
    pair = MachinePair(64, rehearsal=True)
    pair.run()
    order = [type(command) for command in pair.log]
    assert order.index(do.KeepEvidence) < order.index(do.ResumeGuest)


def test_a_rehearsal_that_does_not_verify_fails_and_the_guest_goes_on():
    pair = MachinePair(64, rehearsal=True)
    original = pair.dest_machine.handle

    def miscount(event):
        if isinstance(event, told.PrepareRequested):
            pair.dest.chunks += 1
        return original(event)

    pair.dest_machine.handle = miscount
    assert pair.run() == "failed"
    assert pair.guest.running_at == "source"
    assert pair.dest.evidence is None


@pytest.mark.parametrize(
    ("rehearsal", "answer"),
    [(True, told.Answer.PREPARED), (False, told.Answer.VERIFIED)],
    ids=["real", "mock"],
)
def test_the_answer_to_a_rehearsal_and_to_the_real_thing_are_not_taken_for_each_other(rehearsal, answer):
    pair = MachinePair(64, rehearsal=rehearsal)

    def mistake(pair, command):
        if isinstance(command, do.SendPrepare):
            pair.events.appendleft(told.PrepareAnswered(answer))

    pair._before = mistake
    assert pair.run() == "failed"
    assert pair.guest.running_at == "source"
    assert pair.source_journal == ["STARTED", "ABORTED"]


@pytest.mark.parametrize("phase", sorted(SourcePhase, key=lambda phase: phase.value), ids=lambda p: p.name)
def test_every_event_that_is_not_in_the_table_is_refused(phase):
    samples = {
        told.MigrationRequested: told.MigrationRequested(KEY, 4, told.Skip.NONE, Limits(), 1),
        told.DestinationOpened: told.DestinationOpened("x"),
        told.Harvested: told.Harvested(np.zeros(4, bool)),
        told.GuestSaved: told.GuestSaved(1),
        told.PrepareAnswered: told.PrepareAnswered(told.Answer.PREPARED),
        told.PagesSent: told.PagesSent(0, 0, 0),
        told.AllAcknowledged: told.AllAcknowledged(),
        told.GuestPaused: told.GuestPaused(),
        told.GuestResumed: told.GuestResumed(),
    }
    for kind, event in samples.items():
        if kind in TRANSITIONS[phase] or (phase in TURNED_PHASES and kind in LATE_ANSWERS):
            continue
        machine = SourceMachine()
        machine.phase = phase
        with pytest.raises(LocalProtocolError):
            machine.handle(event, 0)


def test_no_phase_is_a_dead_end_but_the_final_ones():
    for phase, row in TRANSITIONS.items():
        assert bool(row) != (phase in FINAL_PHASES), phase
    reached = {SourcePhase.IDLE} | {
        t for row in TRANSITIONS.values() for targets in row.values() for t in targets
    }
    assert reached == set(SourcePhase)


# The phases of a migration that nothing disturbs; a hook sees a phase by the orders given in it.
QUIET_PHASES = sorted(REVERSIBLE_PHASES - {SourcePhase.KEEPING_EVIDENCE}, key=lambda phase: phase.value)
QUIET_PHASES += [SourcePhase.RECORDING, SourcePhase.COMMITTING, SourcePhase.COMPLETING]


@pytest.mark.parametrize("skip", [told.Skip.NONE, told.Skip.HINT])
@pytest.mark.parametrize("phase", QUIET_PHASES, ids=lambda phase: phase.name)
def test_a_late_hint_is_stale_in_every_phase_and_never_an_error(phase, skip):
    late = told.HintsReported(7, np.array([1], np.uint64), np.array([5], np.uint64), stopped=True)
    pair = MachinePair(64, skip=skip, before=at_phase(phase, late))
    assert pair.run() == "completed"
    assert (pair.dest.memory == pair.guest.memory).all()
    reached = skip.uses_hints or phase not in {SourcePhase.HINTING, SourcePhase.CLOSING_HINTS}
    assert pair.source.ledger.to_dict()["stale_pages"] == (5 if reached else 0)


def test_a_restarted_source_that_was_committing_asks_and_does_what_it_is_told():
    for image_there, outcome, owner in ((True, "completed", "dest"), (False, "failed", "source")):
        first = MachinePair(64)
        first.run_until_commit_is_sent()
        first.dest.restored = image_there
        second = MachinePair(64, guest=first.guest)
        second.dest_machine, second.dest = first.dest_machine, first.dest
        second.source_journal = first.source_journal
        assert second.run(told.CommitPending(first.key, first.digest())) == outcome
        assert second.guest.running_at == owner


def test_a_guest_that_does_not_start_at_once_is_started_again_before_committed_is_answered():
    pair = MachinePair(64)
    pair.dest_starts_fail = 2
    assert pair.run() == "completed"
    assert pair.count(do.SendCommit) == 3
    assert pair.dest.running
