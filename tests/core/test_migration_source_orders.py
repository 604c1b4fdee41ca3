"""What the source's machine orders, to the letter: what no run shows, because nothing goes wrong there."""

import numpy as np
import pytest

from migration import commands as do
from migration import events as told
from migration.page_bits import PageBits
from migration.round_book import RoundBook
from migration.rounds import Limits
from migration.source_machine import SourceMachine
from migration.source_phases import SourcePhase
from migration.testing import MachinePair

PAGES = 64
ONE_MS = 1_000_000


def mask_of(*pfns):
    mask = np.zeros(PAGES, bool)
    mask[list(pfns)] = True
    return mask


def armed(ballooned):
    """A machine whose guest has this balloon, and what it ordered when tracking began."""
    machine, pair = SourceMachine(), MachinePair(PAGES)
    request = told.MigrationRequested(pair.key, PAGES, told.Skip.NONE, Limits(), hint_wait_ms=100)
    machine.handle(request, 0)
    machine.handle(told.DestinationOpened("one"), 0)
    return machine, machine.handle(told.TrackingStarted(ballooned), 0)


def test_the_first_round_sends_every_page_but_those_in_the_balloon():
    machine, commands = armed(PageBits.of(mask_of(5, 6, 63)))
    (order,) = (command for command in commands if isinstance(command, do.SendPages))
    assert order.pfns.tolist() == [pfn for pfn in range(PAGES) if pfn not in (5, 6, 63)]
    assert machine.round_set.ledger.ballooned_pages == 3
    _, without = armed(None)
    assert without[-1].pfns.tolist() == list(range(PAGES))


def test_hazard_3_the_last_rounds_id_means_nothing_before_this_rounds_id_is_known():
    """It would skip a page that was written since, and whose harvest is being sent."""
    late = told.HintsReported(1, np.array([12], np.uint64), np.array([1], np.uint64), stopped=True)
    asked = []

    def interfere(pair, command):
        if isinstance(command, do.PauseGuest):
            return
        if isinstance(command, do.AwaitAcknowledgements) and len(asked) == 1:
            pair.guest.write(12, 4711)  # so that there is a second round, with this page in it
        if isinstance(command, do.OpenHints):
            asked.append(command)
            if len(asked) == 2:
                pair.events.appendleft(late)

    pair = MachinePair(PAGES, skip=told.Skip.HINT, before=interfere)
    pair.guest.free[10:30] = True
    assert pair.run() == "completed"
    assert len(asked) == 2
    assert pair.dest.memory[12] == 4711
    assert pair.source.ledger.rounds[1].skipped_pages == 0
    assert pair.source.ledger.to_dict()["stale_pages"] == 1


def test_what_a_stale_report_says_is_counted_with_what_the_device_found_stale_in_it():
    machine, _ = armed(None)
    runs = np.array([3], np.uint64), np.array([2], np.uint64)
    assert machine.handle(told.HintsReported(99, *runs, stale_pages=7, rejected_ranges=4), 0) == []
    assert machine.ledger.to_dict()["stale_pages"] == 2 + 7
    assert machine.ledger.to_dict()["rejected_ranges"] == 4


@pytest.mark.parametrize("outcome", ["completed", "rehearsal", "cancelled"])
def test_however_it_ends_no_timer_is_left(outcome):
    def cancel(pair, command):
        if outcome == "cancelled" and isinstance(command, do.SendPages) and not pair.events:
            pair.events.append(told.CancelRequested("enough"))

    limits = Limits(downtime_limit_ms=0.0, timeout_ms=60_000, link_timeout_ms=5_000)
    pair = MachinePair(
        PAGES, skip=told.Skip.HINT, limits=limits, rehearsal=outcome == "rehearsal", before=cancel
    )
    assert pair.run() == outcome
    assert {command.timer for command in pair.log if isinstance(command, do.ArmTimer)} >= {
        told.Timer.MIGRATION,
        told.Timer.HINT_WAIT,
    }
    assert pair.timers == {}


def test_asking_for_ever_is_told_ever_more_rarely():
    pair = MachinePair(PAGES)
    refusals = []

    def stay_down(pair, command):
        if isinstance(command, do.SendCommit):
            refusals.append(command)
            pair.link_up = len(refusals) > 9

    pair._before = stay_down
    assert pair.run() == "completed"
    notes = [c.fields["times"] for c in pair.log if isinstance(c, do.Note) and c.name == "commit_unanswered"]
    assert notes == [1, 2, 4, 8]


class TestBooks:
    """RoundBook: time, and what is compared with what."""

    def opened(self, *, begun_sending_ns):
        book = RoundBook()
        book.open(PageBits.of(mask_of(*range(10))), None, 0, hints=True)
        book.begin_sending(begun_sending_ns)
        return book

    def rate_at(self, book, now_ns):
        book.take()
        book.sent(told.PagesSent(10, 0, 10 * 4096))
        book.finish(mask_of(1, 2), now_ns)
        return book.stats(mask_of(1, 2), now_ns, link_up=True).rate_bytes_per_s

    def test_a_link_that_was_lost_before_anything_was_sent_costs_only_what_is_after(self):
        book = self.opened(begun_sending_ns=5 * ONE_MS)
        book.link_was_lost(1 * ONE_MS, 8 * ONE_MS)  # since before the first batch, which waited for it
        assert self.rate_at(book, 10 * ONE_MS) == pytest.approx(10 * 4096 / 2e-3)

    def test_the_rate_of_dirtying_is_the_whole_rounds_and_the_links_rate_is_of_sending(self):
        book = self.opened(begun_sending_ns=6 * ONE_MS)
        assert self.rate_at(book, 10 * ONE_MS) == pytest.approx(10 * 4096 / 4e-3)
        assert book.samples == [(pytest.approx(10e-3), 2)]

    def test_rounds_under_different_throttles_are_not_compared(self):
        book, before = RoundBook(), []
        for index, (remaining, throttle) in enumerate([(30, 0), (20, 0), (10, 50), (5, 50)]):
            book.open(PageBits(PAGES), None, index, hints=False)
            book.finish(None, index)
            stats = book.stats(mask_of(*range(remaining)), index, link_up=True)
            before.append(stats.before)
            book.decided(stats, throttle)
        assert before == [(), (30,), (30, 20), (10,)]

    def test_what_the_device_rejected_is_in_the_rounds_books(self):
        book = self.opened(begun_sending_ns=0)
        runs = np.array([3], np.uint64), np.array([2], np.uint64)
        book.hint(told.HintsReported(1, *runs, stale_pages=5, rejected_ranges=4))
        ledger = book.current.ledger
        assert (ledger.skipped_pages, ledger.stale_pages, ledger.rejected_ranges) == (2, 5, 4)


def test_the_last_round_takes_no_hints():
    """The guest is paused: what it hinted before may be in the pages that are still to be sent."""
    pair = MachinePair(PAGES, skip=told.Skip.HINT)
    rounds = []

    def note(pair, command):
        if isinstance(command, do.SendPages | do.AwaitAcknowledgements):
            rounds.append((pair.source.phase, pair.source.round_set.hints_allowed))

    pair._before = note
    assert pair.run() == "completed"
    assert {allowed for phase, allowed in rounds if phase is SourcePhase.SENDING} == {True}
    assert {allowed for phase, allowed in rounds if phase is SourcePhase.FINAL_DRAINING} == {False}
