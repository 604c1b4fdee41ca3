"""Nodes that fail in one way each: what the proof is there to catch. Each function arms one failure."""

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np

from dest_node import intake
from dest_node.page_receiver import PageReceiver
from host.device_log import DeviceLog
from host.errors import AgentError
from migration.codec import ZERO_PAGE_HASH
from migration.page_bits import PageBits
from migration.pages import PAGE_BYTES, pfns_of
from migration.round_book import RoundBook
from migration.source_phases import SourcePhase
from source_node import migration_run
from source_node.page_reader import PageReader
from source_node.shell import SourceShell

KERNEL_PAGES = 512  # boot page, rings, frame table and free maps of these tests' guests end below
HOLD_S_MAX = 20.0


def wrong_skip():
    """The source skips pages that nobody hinted: every eighth of those that the guest kept for itself."""
    honest = RoundBook.hint

    def hint(book, report):
        honest(book, report)
        if report.stopped:
            assert book.current.remaining >= 0  # what was hinted is booked once somebody looks
            kept = np.flatnonzero(book.current.candidates & ~book.current._hinted.mask())
            chosen = kept[kept >= KERNEL_PAGES][::8].astype(np.uint64)
            book.current.hint(chosen, np.ones(chosen.size, np.uint32))

    RoundBook.hint = hint


def impatient():
    """No harm, for tests that wait for it: who waits for a peer, or for a thread that is held, waits less long."""
    intake.SILENCE_S = 2.0
    migration_run.CANCEL_ANSWER_S = 0.1


def _with_tracker(wrap):
    honest = SourceShell._start_tracking

    def start_tracking(shell):
        honest(shell)
        tracker = shell._tracker
        tracker.harvest = wrap(shell, tracker.harvest)

    SourceShell._start_tracking = start_tracking


def harvest_loses_a_page():
    """One page that was written after it was sent is left out of every harvest."""
    lost = []

    def wrap(shell, honest):
        def harvest():
            dirty = honest().mask()
            if not lost:
                sent = shell._reader.sent_hashes
                changed = dirty & (sent != 0) & (sent != ZERO_PAGE_HASH) & (shell._ram.hash_pages() != sent)
                changed[:KERNEL_PAGES] = False
                lost.extend(np.flatnonzero(changed)[:1])
            dirty[lost] = False
            return PageBits.of(dirty)

        return harvest

    _with_tracker(wrap)


def hint_clears_the_dirty_log():
    """The destructive mistake of hazard 1: what was hinted in a round is not dirty at its end."""

    def wrap(shell, honest):
        def harvest():
            dirty = honest().mask()
            current = shell._machine.round_set
            return PageBits.of(dirty & ~current.skipped if current is not None else dirty)

        return harvest

    _with_tracker(wrap)


def stores_unlogged():
    """The device forgets to log what it stores into used rings."""
    DeviceLog.add_stores = lambda _log, _stores: None


def zero_record_ignored():
    """The destination books a zero record and leaves the page as it is."""

    def store_zero(receiver, chunk):
        receiver.stored_hashes[pfns_of(chunk.zero_first, chunk.zero_pages)] = ZERO_PAGE_HASH

    PageReceiver._store_zero = store_zero


def store_dropped():
    """The destination books a chunk of the guest's own pages and gives them back: they never arrive."""
    dropped = []
    honest = PageReceiver._store_data

    def store_data(receiver, chunk):
        honest(receiver, chunk)
        if not dropped and chunk.run_first.size and int(chunk.run_first.min()) >= KERNEL_PAGES:
            dropped.append(True)
            for first, count in zip(chunk.run_first.tolist(), chunk.run_pages.tolist(), strict=True):
                receiver.ram.punch(first, count)

    PageReceiver._store_data = store_data


def image_not_compared():
    """The destination does not compare what it reads back with what it stored."""
    PageReceiver.difference = lambda _receiver, _found: None


def corrupts_in_flight():
    """A bit of the third chunk's last page flips after it was hashed."""
    honest = PageReader.chunks_of

    def chunks_of(reader, numbers, *arguments):
        for chunk in honest(reader, numbers, *arguments):
            if numbers.next_sequence != 3:
                yield chunk
                continue
            assert chunk.data_pages, "the test's third chunk carries pages"
            message = bytearray(chunk.message)
            message[-PAGE_BYTES // 2] ^= 0x10
            yield replace(chunk, message=bytes(message))

    PageReader.chunks_of = chunks_of


def rolls_back():
    """The source hands over the guest as it was when the migration was asked for: all of it, consistently."""
    honest_begin, honest_save = SourceShell._open, SourceShell._save
    honest_harvest = SourceShell._harvest
    old = {}

    def begin(shell, key):
        link = shell._host.guest.link
        link.pause()
        old["ram"] = os.pread(shell._ram.fd, shell._ram.memory_bytes, 0)
        old["state"], old["device"] = link.save(), shell._host.balloon.device_state()
        link.resume(key.guest_epoch)
        honest_begin(shell, key)

    def harvest(shell):
        if shell._machine.phase is SourcePhase.FINAL_HARVESTING:
            os.pwrite(shell._ram.fd, old["ram"], 0)
            shell._tracker.harvest = lambda: PageBits.full(shell._ram.pages)
        honest_harvest(shell)

    def save(shell, rehearsal):
        shell._vcpu_state = old["state"]  # asked for already, while the last pages went
        shell._host.balloon.device_state = lambda: old["device"]
        honest_save(shell, rehearsal)

    SourceShell._open, SourceShell._harvest, SourceShell._save = begin, harvest, save


def resumes_after_committed():
    """The source lets its guest go on although it was given away."""
    _without_freeze()
    _resumes_when_all_is_written()


def resumes_a_frozen_guest():
    """The same, against an agent that was told that the guest is gone."""
    _resumes_when_all_is_written()


def _without_freeze():
    honest = SourceShell._given_away

    def given_away(shell):
        shell._host.guest.link.freeze = lambda: None
        honest(shell)

    SourceShell._given_away = given_away


def _resumes_when_all_is_written():
    honest = SourceShell.write_evidence

    def write_evidence(shell):
        honest(shell)
        guest = shell._host.guest
        try:
            guest.link.resume(guest.hello().guest_epoch)
        except AgentError as error:
            shell._host.events.add("resume_refused", reason=str(error))

    SourceShell.write_evidence = write_evidence


def _held(name):
    """Makes a step of the intake tell that it begins, and wait until the file BALLAST_MISCHIEF_GO is there."""
    honest = getattr(intake.Intake, name)

    def step(this, *arguments):
        this._host.events.add("held", step=name)
        go, moment = Path(os.environ["BALLAST_MISCHIEF_GO"]), threading.Event()
        for _ in range(int(HOLD_S_MAX / 0.01)):
            if go.exists():
                break
            moment.wait(0.01)
        return honest(this, *arguments)

    setattr(intake.Intake, name, step)


def holds_prepare():
    """The destination verifies the image only when it is let."""
    _held("_verify")


def holds_commit():
    """The destination confirms the guest, after COMMITTING, only when it is let."""
    _held("_confirm")
