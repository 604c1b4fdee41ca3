"""A lost link in every phase: what is sent again, what is never sent again, and how it ends where it stays lost."""

from dataclasses import replace

import numpy as np
import pytest

from migration import commands as do
from migration import events as told
from migration.round_book import BATCH_PAGES
from migration.rounds import Limits
from migration.source_phases import RECOVERIES, REVERSIBLE_PHASES, Recovery, SourcePhase
from migration.testing import MachinePair

P = SourcePhase
LINK_TIMEOUT_MS = 5_000
LIMITS = Limits(downtime_limit_ms=0.0, link_timeout_ms=LINK_TIMEOUT_MS, timeout_ms=60_000)
PAGES = 2 * BATCH_PAGES + 900  # three batches, so that one can be on its way while another is ordered
PHASES = sorted(REVERSIBLE_PHASES, key=lambda phase: phase.value)
ONLY_WITH_HINTS = {P.HINTING, P.CLOSING_HINTS}
PHASES_AND_SKIPS = [
    pytest.param(phase, skip, id=f"{phase.name}-{skip.value}")
    for phase in PHASES
    for skip in (told.Skip.NONE, told.Skip.HINT)
    if skip.uses_hints or phase not in ONLY_WITH_HINTS
]


class Cut:
    """A hook: cuts the link when the source is in `phase`, and heals it after `heal_after` questions."""

    def __init__(self, phase, heal_after=3):
        self.phase = phase
        self.heal_after = heal_after
        self.done = False
        self.questions = 0
        self.lost = np.empty(0, np.uint64)
        self.stored = 0

    def __call__(self, pair, command):
        if isinstance(command, do.PauseGuest):
            pair.guest.write(3, 4711)  # so that the last round has something to send
        if not self.done and pair.source.phase is self.phase:
            self.done = True
            self.lost = np.unique(np.concatenate([self.lost, *(pfns for pfns, _ in pair.on_the_way)]))
            self.stored = pair.dest.chunks
            pair.cut()
        elif isinstance(command, do.ResumeDestination | do.OpenDestination | do.SendPrepare) and self.done:
            self.questions += 1
            if self.questions >= self.heal_after:
                pair.heal()


def pair_with(cut, **options):
    rehearsal = cut.phase is P.KEEPING_EVIDENCE
    pair = MachinePair(PAGES, before=cut, window=2, rehearsal=rehearsal, **{"limits": LIMITS, **options})
    pair.guest.free[10:30] = True
    return pair


def used(pair):
    return ~pair.guest.free if pair.skip.uses_hints else np.ones(pair.pages, bool)


@pytest.mark.parametrize(("phase", "skip"), PHASES_AND_SKIPS)
def test_a_link_that_comes_back_costs_time_and_the_pages_on_the_way(phase, skip):
    cut = Cut(phase)
    pair = pair_with(cut, skip=skip)
    assert pair.run() == ("rehearsal" if pair.rehearsal else "completed")
    assert cut.done
    arrived = pair.dest.evidence if pair.rehearsal else pair.dest.memory
    assert (arrived[used(pair)] == pair.guest.memory[used(pair)]).all()
    needed = phase is not P.KEEPING_EVIDENCE  # whoever has its answer needs no link; a later question does
    assert pair.source.link.count == needed
    assert pair.source.link.resent_pages == len(cut.lost)
    assert pair.source.ledger.resent_pages == len(cut.lost)
    assert (pair.source.link.paused_ns > 0) == needed
    for totals in pair.source.ledger.rounds:
        assert totals.candidate_pages == totals.sent_pages + totals.zero_pages + totals.skipped_pages


@pytest.mark.parametrize("window", [0, 1, 2])
def test_exactly_the_unacknowledged_pages_go_again(window):
    cut = Cut(P.DRAINING)
    pair = MachinePair(PAGES, before=cut, window=window, limits=LIMITS)
    assert pair.run() == "completed"
    again = np.flatnonzero(pair.sendings > 1)
    expected = np.setdiff1d(cut.lost, [])
    written = {3}  # by the guest, in the last round
    assert set(again.tolist()) - written == set(expected.astype(int).tolist()) - written
    assert pair.source.link.resent_pages == len(cut.lost)
    assert (window == 0) == (len(cut.lost) == 0)


def test_a_link_that_is_lost_again_and_again_is_had_again_each_time():
    cuts = []

    def cut_thrice(pair, command):
        if isinstance(command, do.SendPages) and len(cuts) < 3:
            cuts.append(command)
            pair.cut()
        elif isinstance(command, do.ResumeDestination):
            pair.heal()

    pair = MachinePair(PAGES, before=cut_thrice, window=2, limits=LIMITS)
    assert pair.run() == "completed"
    assert pair.source.link.count == 3
    assert (pair.dest.memory == pair.guest.memory).all()


def test_streams_that_break_at_once_are_resumed_once_more():
    def cut_twice(pair, command):
        if isinstance(command, do.SendPages) and not pair.source.link.lost_at_ns:
            pair.cut()
        elif isinstance(command, do.ResumeDestination):
            pair.heal()
        elif isinstance(command, do.ResumeStreams) and pair.count(do.ResumeStreams) == 0:
            pair.cut("broken again")

    pair = MachinePair(PAGES, before=cut_twice, window=2, limits=LIMITS)
    assert pair.run() == "completed"
    assert pair.source.link.count == 1
    assert pair.count(do.ResumeStreams) == 2
    assert (pair.dest.memory == pair.guest.memory).all()


def test_the_guest_runs_on_and_is_not_paused_while_the_link_is_lost():
    written = []

    def write_meanwhile(pair, command):
        if isinstance(command, do.Harvest) and not written:
            pair.cut()
        if isinstance(command, do.ResumeDestination):
            assert pair.guest.running_at == "source"
            written.append(len(written))
            pair.guest.write(100 + len(written), 7)
            if len(written) == 4:
                pair.heal()

    limits = Limits(downtime_limit_ms=1e9, link_timeout_ms=LINK_TIMEOUT_MS)  # a stop is always near enough
    pair = MachinePair(PAGES, before=write_meanwhile, limits=limits)
    assert pair.run() == "completed"
    assert (pair.dest.memory == pair.guest.memory).all()


@pytest.mark.parametrize(
    ("phase", "skip"), [one for one in PHASES_AND_SKIPS if one.values[0] is not P.KEEPING_EVIDENCE]
)
def test_a_link_that_stays_lost_ends_the_attempt_and_a_retry_is_complete(phase, skip):
    cut = Cut(phase, heal_after=10_000)
    pair = pair_with(cut, skip=skip)
    assert pair.run() == "cancelled"
    assert f"link_timeout = {LINK_TIMEOUT_MS} ms" in pair.outcome.reason
    assert pair.outcome.cause is do.Cause.LINK
    assert pair.guest.running_at == "source"
    assert pair.source_journal[-1] == "ABORTED"
    assert pair.hints_told_done == (pair.count(do.OpenHints) > 0)
    assert not pair.timers, "a timer outlived its attempt"
    retry = MachinePair(PAGES, attempt=2, guest=pair.guest, skip=skip, limits=LIMITS)
    retry.dest_machine, retry.dest = pair.dest_machine, pair.dest
    retry.dest.chunks = 0
    pair.guest.write(4000, 99)
    assert retry.run() == "completed"
    assert (retry.dest.memory[used(retry)] == retry.guest.memory[used(retry)]).all()
    assert not retry.dest.memory[~used(retry)].any(), "a skipped page is known zero"


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_without_a_link_timeout_a_lost_link_ends_the_attempt_at_once(phase):
    cut = Cut(phase)
    pair = pair_with(cut, skip=told.Skip.HINT, limits=Limits(downtime_limit_ms=0.0))
    outcome = pair.run()
    if RECOVERIES[phase] is Recovery.NOT_NEEDED:
        assert outcome in {"rehearsal", "failed"}  # failed: Prepare finds the link down
    else:
        assert outcome == "failed"
        assert pair.outcome.cause is do.Cause.LINK
    assert pair.guest.running_at == "source"


@pytest.mark.parametrize(
    ("event", "outcome", "cause"),
    [
        (told.CancelRequested("because"), "cancelled", do.Cause.REQUEST),
        (told.TimerFired(told.Timer.MIGRATION), "cancelled", do.Cause.LIMIT),
        (told.PeerLost("that attempt was aborted"), "failed", do.Cause.DESTINATION),
        (told.HostFailed("broken"), "failed", do.Cause.HOST),
    ],
    ids=["cancel", "timeout", "refused", "host_failed"],
)
@pytest.mark.parametrize("phase", [P.OPENING, P.SENDING, P.HINTING, P.FINAL_SENDING, P.PREPARING])
def test_cancel_timeout_and_failure_act_while_reconnecting(phase, event, outcome, cause):
    cut = Cut(phase, heal_after=10_000)
    pair = pair_with(cut, skip=told.Skip.HINT)
    hook = pair._before

    def interfere(pair, command):
        hook(pair, command)
        if isinstance(command, do.ArmTimer) and command.timer is told.Timer.LINK_RETRY and not pair.events:
            pair.events.append(event)

    pair._before = interfere
    assert pair.run() == outcome
    assert pair.outcome.cause is cause
    assert pair.guest.running_at == "source"
    assert not pair.timers


@pytest.mark.parametrize("phase", [phase for phase in PHASES if RECOVERIES[phase] is not Recovery.NOT_NEEDED])
@pytest.mark.parametrize("paused_ms", [0, 700, 60_000])
def test_a_guest_that_stands_still_waits_for_the_link_for_a_time_of_its_own(phase, paused_ms):
    limits = replace(LIMITS, link_timeout_paused_ms=paused_ms)
    stands_still = phase.value >= P.PAUSING.value
    cut = Cut(phase, heal_after=10_000)
    pair = pair_with(cut, skip=told.Skip.HINT, limits=limits)
    pair.run()
    assert pair.outcome.cause is do.Cause.LINK
    assert pair.guest.running_at == "source"
    waited_ms = [command.delay_ms for command in pair.log if command_arms(command, told.Timer.LINK)]
    if stands_still and not paused_ms:
        assert (pair.outcome.outcome, waited_ms) == ("failed", [])
        return
    name, patience_ms = "link_timeout", LINK_TIMEOUT_MS
    if stands_still:
        name, patience_ms = "link_timeout_paused", min(paused_ms, LINK_TIMEOUT_MS)
    assert (pair.outcome.outcome, waited_ms) == ("cancelled", [patience_ms])
    assert f"beyond {name} = {patience_ms} ms" in pair.outcome.reason


def command_arms(command, timer):
    return isinstance(command, do.ArmTimer) and command.timer is timer


def test_a_lost_link_in_stop_and_copy_keeps_the_guest_paused_and_the_timeout_acts():
    limits = Limits(downtime_limit_ms=0.0, link_timeout_ms=50_000, timeout_ms=1_000)
    cut = Cut(P.FINAL_SENDING, heal_after=10_000)
    pair = pair_with(cut, limits=limits)
    assert pair.run() == "cancelled"
    assert "timeout of 1000 ms" in pair.outcome.reason
    assert pair.guest.running_at == "source"


def test_a_rehearsal_whose_answer_was_lost_is_answered_again():
    def lose_the_answer(pair, command):
        if isinstance(command, do.SendPrepare) and pair.count(do.SendPrepare) == 0:
            key, digest, rehearsal = command.key, command.image_digest, command.rehearsal
            pair.drive_dest(told.PrepareRequested(key, "one", digest, pair.sent_chunks, rehearsal))
            pair.cut("the answer was lost")
        else:
            pair.heal()

    pair = MachinePair(64, before=lose_the_answer, rehearsal=True, limits=LIMITS)
    assert pair.run() == "rehearsal"
    assert pair.count(do.SendPrepare) == 2
    assert pair.guest.running_at == "source"
    assert (pair.dest.evidence == pair.guest.memory).all()


@pytest.mark.parametrize("phase", [P.RECORDING, P.COMMITTING], ids=lambda phase: phase.name)
def test_after_committing_a_lost_link_decides_nothing(phase):
    pair = MachinePair(PAGES, limits=LIMITS)
    told_once = []

    def lose(pair, _command):
        if pair.source.phase is phase and not told_once:
            told_once.append(True)
            pair.events.append(told.LinkLost("gone"))

    pair._before = lose
    assert pair.run() == "completed"
    assert told_once
    assert pair.source.link.count == 0
