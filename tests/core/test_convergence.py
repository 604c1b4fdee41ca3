"""Limits, stall and throttle: the rules as tables, and a machine that follows them to every end."""

import numpy as np
import pytest

from migration import commands as do
from migration import events as told
from migration.convergence import ThrottleSteps, at_local_minimum, recent_rate, stalled
from migration.errors import LocalProtocolError
from migration.page_bits import PageBits
from migration.round_book import RoundBook
from migration.rounds import DecisionKind, Limits, RoundStats, decide
from migration.source_phases import SourcePhase
from migration.testing import MachinePair

NEXT, STOP = DecisionKind.NEXT_ROUND, DecisionKind.STOP_COPY
CANCEL, THROTTLE = DecisionKind.CANCEL, DecisionKind.THROTTLE
STEPS = ThrottleSteps(20, 30, 60)
MS = 1_000_000


@pytest.mark.parametrize(
    ("remaining", "is_stalled", "is_minimum"),
    [
        ((1000,), False, True),
        ((1000, 1000), False, True),  # one round that does not shrink is noise
        ((1000, 1000, 1000), True, True),
        ((1000, 990, 980), True, True),  # less than 5 % in two rounds
        ((1000, 990, 940), False, True),
        ((1000, 940, 990), False, False),
        ((1000, 1200, 1100), True, False),
        ((500, 1000, 1000, 1000), True, True),  # the best is long ago, the last three are alike
        ((4000, 2000, 1000, 500), False, True),
    ],
)
def test_what_a_stall_is_and_when_it_is_a_good_moment(remaining, is_stalled, is_minimum):
    assert stalled(remaining) is is_stalled
    assert at_local_minimum(remaining) is is_minimum


@pytest.mark.parametrize(
    ("payload", "ns", "rate"),
    [
        ((), (), 0.0),
        ((0,), (5 * MS,), 0.0),
        ((100,), (1000 * MS,), 100.0),
        ((1000, 10), (1000 * MS, 250 * MS), 40.0),  # the link became slower: only the newest round counts
        ((1000, 10), (1000 * MS, 100 * MS), 1010 / 1.1),  # too short to say anything alone
    ],
)
def test_the_rate_is_that_of_the_newest_rounds(payload, ns, rate):
    assert recent_rate(payload, ns) == pytest.approx(rate)


def test_steps_begin_rise_and_stay_at_their_maximum():
    steps = [0]
    for _ in range(4):
        steps.append(STEPS.after(steps[-1]))
    assert steps == [0, 20, 50, 60, 60]


@pytest.mark.parametrize("wrong", [(0, 10, 50), (60, 10, 50), (20, 0, 50), (20, 10, 100)])
def test_a_throttle_that_means_nothing_is_refused(wrong):
    with pytest.raises(LocalProtocolError):
        ThrottleSteps(*wrong)


RATE = 40_960_000.0  # a page takes 0.1 ms
STUCK = {"before": (5000, 5000), "remaining_pages": 5000}


@pytest.mark.parametrize(
    ("limits", "stats", "kind", "words"),
    [
        ({}, STUCK, NEXT, "above the downtime limit"),
        ({"on_stall": "cancel"}, STUCK, CANCEL, "stalled"),
        ({"on_stall": "switch"}, STUCK, STOP, "local minimum"),
        ({"on_stall": "switch"}, {**STUCK, "remaining_pages": 5100}, NEXT, "waiting for a local minimum"),
        ({"on_stall": "throttle", "throttle": STEPS}, STUCK, THROTTLE, "to 20 %"),
        (
            {"on_stall": "throttle", "throttle": STEPS},
            {**STUCK, "throttle_percent": 60},
            NEXT,
            "maximum of 60",
        ),
        ({"on_stall": "cancel"}, {**STUCK, "remaining_pages": 1000}, STOP, "within the downtime limit"),
        ({"on_stall": "cancel"}, {"before": (5000,), "remaining_pages": 5000}, NEXT, "above"),
        ({"on_timeout": "switch"}, {**STUCK, "elapsed_ms": 10_000.0}, STOP, "timeout of 10000 ms"),
        ({"on_timeout": "cancel"}, {**STUCK, "elapsed_ms": 10_000.0}, CANCEL, "timeout of 10000 ms"),
        ({"on_timeout": "switch"}, {"remaining_pages": 0, "link_up": False}, NEXT, "the link is lost"),
        ({"on_stall": "cancel"}, {**STUCK, "link_up": False}, CANCEL, "stalled"),
    ],
)
def test_decisions_about_stall_timeout_and_a_lost_link(limits, stats, kind, words):
    made = decide(
        RoundStats(**{"index": 5, "elapsed_ms": 50.0, "rate_bytes_per_s": RATE, **stats}),
        Limits(downtime_limit_ms=100, timeout_ms=10_000, **limits),
    )
    assert (made.kind, words in made.reason) == (kind, True), made.reason
    assert made.downtime_ms_estimated == pytest.approx(stats["remaining_pages"] * 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_timeout": "hope"},
        {"on_stall": "hope"},
        {"on_stall": "throttle"},
        {"throttle": STEPS},
        {"link_timeout_ms": -1},
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(LocalProtocolError):
        Limits(**wrong)


class Restless:
    """A guest that dirties as many pages in every round, until it is throttled enough."""

    def __init__(self, pages=40, calm_at=101):
        self.pages = pages
        self.calm_at = calm_at
        self.seen = []

    def __call__(self, pair, command):
        self.seen.append(pair.throttle_percent)
        if isinstance(command, do.AwaitAcknowledgements) and pair.guest.running_at == "source":
            calm = pair.throttle_percent >= self.calm_at
            for pfn in range(0 if calm else self.pages):
                pair.guest.write(pfn, pair.now_ns + pfn)


def restless_pair(hook, **limits):
    return MachinePair(64, before=hook, limits=Limits(downtime_limit_ms=0.0, **limits))


def test_nothing_is_done_about_a_stall_by_default_but_what_the_limits_say():
    pair = restless_pair(Restless(), rounds_max=7)
    assert pair.run() == "completed"
    assert len(pair.source.ledger.rounds) == 8
    assert pair.count(do.ThrottleGuest) == 0


def test_a_stall_that_means_switch_pauses_the_guest_long_before_the_last_round():
    pair = restless_pair(Restless(), rounds_max=30, on_stall="switch")
    assert pair.run() == "completed"
    assert len(pair.source.ledger.rounds) == 4
    assert (pair.dest.memory == pair.guest.memory).all()


def test_a_stall_that_means_cancel_leaves_the_guest_alone():
    pair = restless_pair(Restless(), on_stall="cancel")
    assert pair.run() == "cancelled"
    assert pair.outcome.cause is do.Cause.LIMIT
    assert pair.guest.running_at == "source"


def test_a_throttle_rises_until_the_rounds_shrink_and_is_lifted_when_the_guest_is_paused():
    hook = Restless(calm_at=50)
    pair = restless_pair(hook, on_stall="throttle", throttle=STEPS)
    assert pair.run() == "completed"
    assert [command.percent for command in pair.log if isinstance(command, do.ThrottleGuest)] == [20, 50, 0]
    paused = next(i for i, command in enumerate(pair.log) if isinstance(command, do.PauseGuest))
    saved = next(i for i, command in enumerate(pair.log) if isinstance(command, do.SaveGuest))
    lifted = [i for i, c in enumerate(pair.log) if isinstance(c, do.ThrottleGuest) and c.percent == 0]
    assert paused < lifted[0] < saved


def test_a_guest_that_no_throttle_calms_is_given_to_the_other_limits():
    pair = restless_pair(
        Restless(), on_stall="throttle", throttle=STEPS, rounds_max=12, on_rounds_max="cancel"
    )
    assert pair.run() == "cancelled"
    assert pair.throttle_percent == 0


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (told.CancelRequested("because"), "cancelled"),
        (told.PeerLost("refused"), "failed"),
        (told.LinkLost("gone"), "failed"),
        (told.HostFailed("broken"), "failed"),
        (told.TimerFired(told.Timer.MIGRATION), "cancelled"),
    ],
    ids=["cancel", "refused", "link_lost", "host_failed", "timeout"],
)
@pytest.mark.parametrize("phase", [SourcePhase.SENDING, SourcePhase.DRAINING, SourcePhase.HARVESTING])
def test_a_throttle_is_lifted_however_the_attempt_ends(phase, event, outcome):
    restless, done = Restless(), []

    def hook(pair, command):
        restless(pair, command)
        if pair.throttle_percent and pair.source.phase is phase and not done:
            done.append(True)
            pair.events.appendleft(event)

    pair = restless_pair(hook, on_stall="throttle", throttle=STEPS)
    assert pair.run() == outcome
    assert done
    assert pair.throttle_percent == 0
    assert max(restless.seen) > 0


def test_a_throttle_is_lifted_while_the_link_is_lost_and_comes_back_with_it():
    restless, cut = Restless(), []

    def hook(pair, command):
        restless(pair, command)
        if isinstance(command, do.SendPages) and pair.throttle_percent and not cut:
            pair.cut()
            cut.append(pair.throttle_percent)
        elif isinstance(command, do.ResumeDestination):
            assert pair.throttle_percent == 0
            pair.heal()

    pair = restless_pair(hook, on_stall="throttle", throttle=STEPS, link_timeout_ms=1_000, rounds_max=9)
    assert pair.run() == "completed"
    percents = [command.percent for command in pair.log if isinstance(command, do.ThrottleGuest)]
    assert percents[:3] == [20, 0, 20]
    assert percents[-1] == 0


def test_a_timeout_that_means_switch_finishes_the_round_and_then_pauses():
    def late(pair, command):
        if isinstance(command, do.SendPages) and command.round_index == 2:
            pair.events.append(told.TimerFired(told.Timer.MIGRATION))
            pair.now_ns += 20_000 * MS

    restless = Restless()

    def hook(pair, command):
        restless(pair, command)
        late(pair, command)

    pair = restless_pair(hook, timeout_ms=10_000, on_timeout="switch")
    assert pair.run() == "completed"
    assert len(pair.source.ledger.rounds) == 3
    assert pair.source.stop_decided is not None
    assert pair.source.stop_decided.downtime_ms_estimated > 0
    notes = [c.fields["reason"] for c in pair.log if isinstance(c, do.Note) and c.name == "decision"]
    assert any("timeout of 10000 ms" in reason for reason in notes)


def test_every_decision_is_one_line_with_its_reason():
    pair = restless_pair(Restless(), on_stall="cancel")
    pair.run()
    notes = [c for c in pair.log if isinstance(c, do.Note) and c.name in {"round_ended", "decision"}]
    assert [note.name for note in notes].count("round_ended") == len(pair.source.ledger.rounds) > 1
    assert [note.name for note in notes].count("decision") == 1
    for note in notes:
        assert note.fields["reason"]
        assert "\n" not in str(note.fields["reason"])
        assert note.fields["decision"]


def test_the_books_of_a_round_survive_time_without_a_link():
    book = RoundBook()
    book.open(PageBits.full(10), None, 1000, hints=False)
    book.begin_sending(2000)
    book.take()
    book.link_was_lost(3000, 9000)
    book.sent(told.PagesSent(10, 0, 10 * 4096))
    book.finish(np.zeros(10, bool), 10_000)
    stats = book.stats(np.zeros(10, bool), 10_000, link_up=True)
    assert stats.rate_bytes_per_s == pytest.approx(10 * 4096 / 2000e-9)  # 1000 ns before the loss, 1000 after
