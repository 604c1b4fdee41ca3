"""Guests that no host may trust, and guests in need. Each function arms one behaviour of the agent process."""

import sys
import threading

import numpy as np

from guest_agent.frames import FrameKind
from guest_agent.hint_report import (
    BATCH_BLOCKS,
    BLOCK_BYTES,
    BLOCK_PAGES,
    RESERVED_DESCRIPTORS,
    START_TOKEN,
    STOP_TOKEN,
    HintReport,
    Phase,
)
from guest_agent.workloads.idle import Idle
from virtio.balloon import CMD_ID_STOP

OWNER = 0xFE00  # of what these guests take: no workload has it
PAGE_BYTES = 4096
STEP_PAGES = 256
DICE = np.random.default_rng(20171103)


def _tell(what):
    """Into the agent's log: the test wants to know that it happened."""
    sys.stderr.write(f"mischief: {what}\n")
    sys.stderr.flush()


def _hint(report, addresses, lengths):
    """Queue and show ranges as they are, as far as the ring has room."""
    report._ring.add_inbufs(
        np.asarray(addresses, np.uint64), np.asarray(lengths, np.uint32), reserve=RESERVED_DESCRIPTORS
    )
    report._publish()


def takes_back_before_the_hint():
    """Hazard 1: of every batch, the first block is in use again, and written, before the device sees its hint."""

    def send_blocks(report):
        room = min(report._ring.free_descriptors - RESERVED_DESCRIPTORS, BATCH_BLOCKS, 4)
        if room <= 0:
            return False
        heads = report._buddy.alloc_blocks(10, room, kind=FrameKind.HELD, owner=0xFFFD)
        if not heads.size:
            report._phase = Phase.CLOSING
            return True
        lengths = np.full(heads.size, BLOCK_BYTES, np.uint32)
        report._ring.add_inbufs(heads << np.uint64(12), lengths, reserve=RESERVED_DESCRIPTORS)
        _use(report, int(heads[0]), BLOCK_PAGES)
        report._publish()
        return True

    HintReport._send_blocks = send_blocks


def _use(report, first, pages):
    """A held range becomes somebody's memory, with fresh content."""
    with report._buddy.lock:
        report._frames.mark_pages(np.arange(first, first + pages), FrameKind.ANON, OWNER, 0)
    report._memory[first * PAGE_BYTES : (first + pages) * PAGE_BYTES] = DICE.bytes(pages * PAGE_BYTES)


def hungry():
    """Hazards 1 and 11: when its report has ended, the guest needs nearly all of what it holds, and writes it."""
    ended, eaten = [], []
    honest_finish, honest_step = HintReport._finish, Idle.step

    def finish(report):
        honest_finish(report)
        ended.append(report)

    def step(workload, now_ns):
        if not ended:
            honest_step(workload, now_ns)
            return 1_000_000
        report = ended[0]
        if not eaten:
            wanted, held = report._buddy.free_pages + report.held_pages * 3 // 4, report.held_pages
            eaten.extend((wanted, held))
        # A page is written in the step that takes it: a guest that is paused in between uses what it has written.
        part = min(eaten[0], STEP_PAGES)
        if part:
            eaten[0] -= part
            for pfn in report._buddy.alloc_bulk(part, kind=FrameKind.ANON, owner=OWNER).tolist():
                report._memory[pfn * PAGE_BYTES : (pfn + 1) * PAGE_BYTES] = DICE.bytes(PAGE_BYTES)
            _tell(f"took {part} pages, so far {eaten[1] - report.held_pages} of them held")
        return 1_000_000 if part else honest_step(workload, now_ns)

    HintReport._finish, Idle.step = finish, step


def never_ends_its_report():
    """Hazard 4: the STOP never comes."""
    honest = HintReport._send_command

    def send_command(report, token, value):
        return False if token == STOP_TOKEN else honest(report, token, value)

    HintReport._send_command = send_command


def floods():
    """Hazards 4 and 8: every block many times over, in halves, and in pieces that begin and end inside pages."""
    honest = HintReport._send_blocks

    def send_blocks(report):
        sent = honest(report)
        heads = report._held_heads()
        if not heads.size:
            return sent
        base = heads << np.uint64(12)
        half = np.uint64(BLOCK_BYTES // 2)
        odd = base - np.uint64(
            PAGE_BYTES - 1
        )  # all but the first byte of the page before, which is not hinted
        addresses = np.concatenate([base, base + half, odd, base + np.uint64(100)])
        lengths = np.concatenate([
            np.full(heads.size, size, np.uint32)
            for size in (BLOCK_BYTES, BLOCK_BYTES // 2, 3 * PAGE_BYTES, 5 * PAGE_BYTES + 17)
        ])  # fmt: skip
        times = 1 + report._ring.free_descriptors // max(1, addresses.size)
        _hint(report, np.tile(addresses, times), np.tile(lengths, times))
        return sent

    HintReport._send_blocks = send_blocks


def hints_on():
    """Hazards 2 and 3: the guest goes on hinting what it holds, whatever the host says, until DONE."""
    honest_step, honest_release = HintReport.step, HintReport.release
    done, moment = [], threading.Event()

    def step(report):
        moved = honest_step(report)
        heads = report._held_heads()
        if not heads.size or done:
            return moved
        _hint(report, heads << np.uint64(12), np.full(heads.size, BLOCK_BYTES, np.uint32))
        moment.wait(0.0005)  # a guest, not a busy loop
        return True

    def release(report):
        done.append(True)
        return honest_release(report)

    HintReport.step, HintReport.release = step, release
    HintReport.has_work = property(lambda report: not done and bool(report._held_heads().size))


def replays_ids():
    """Hazard 3: every later report begins with a late STOP and goes on under the first report's id."""
    honest_command, honest_blocks = HintReport._send_command, HintReport._send_blocks
    first, begun = [], []

    def send_command(report, token, value):
        if token == START_TOKEN:
            first.append(value)
            begun.append(value)
            if len(begun) > 1:
                honest_command(report, STOP_TOKEN, CMD_ID_STOP)
            value = first[0]
        return honest_command(report, token, value)

    def send_blocks(report):
        heads = report._held_heads()
        if len(begun) > 1 and heads.size:
            _hint(report, heads << np.uint64(12), np.full(heads.size, BLOCK_BYTES, np.uint32))
        return honest_blocks(report)

    HintReport._send_command, HintReport._send_blocks = send_command, send_blocks


def lies_in_chains():
    """Hazard 9: ranges outside RAM, ranges that wrap, and descriptors that point at themselves, among good ones."""
    honest = HintReport._send_blocks

    def send_blocks(report):
        sent = honest(report)
        if report._ring.free_descriptors < 16:
            return sent
        end = len(report._memory)
        _tell("lied")
        _hint(
            report, [end, end - PAGE_BYTES, 2**64 - PAGE_BYTES, 2**63], [PAGE_BYTES, 2 * PAGE_BYTES, 8192, 4]
        )
        head = report._ring.add([], [(0, PAGE_BYTES)], None)  # page 0 is the guest's boot page
        at = report._ring.layout.desc + 16 * head
        report._memory[at + 12 : at + 16] = (1 | 2).to_bytes(2, "little") + head.to_bytes(2, "little")
        report._publish()
        return sent

    HintReport._send_blocks = send_blocks


def breaks_its_ring():
    """Hazard 9: the available index jumps by more than the ring holds; the ring is of no use from then on."""

    def send_blocks(report):
        at = report._ring.layout.avail + 2
        index = int.from_bytes(report._memory[at : at + 2], "little")
        report._memory[at : at + 2] = ((index + 5000) & 0xFFFF).to_bytes(2, "little")
        report._publish = lambda **_: None  # the next honest index would look like a repair
        report._kick()
        report._phase = Phase.CLOSING
        return True

    HintReport._send_blocks = send_blocks


def zeroes_a_page():
    """A page of the guest's own is full at first and zero from its second report on."""
    honest = HintReport.start
    mine = []

    def start(report, command_id):
        honest(report, command_id)
        if not mine:
            mine.extend(report._buddy.alloc_bulk(4, kind=FrameKind.ANON, owner=OWNER).tolist())
            for pfn in mine:
                report._memory[pfn * PAGE_BYTES : (pfn + 1) * PAGE_BYTES] = b"\xa5" * PAGE_BYTES
        else:
            for pfn in mine:
                report._memory[pfn * PAGE_BYTES : (pfn + 1) * PAGE_BYTES] = bytes(PAGE_BYTES)

    HintReport.start = start


def ends_its_report_at_done():
    """Hazard 4, by a guest that is merely slow: no STOP before the host says STOP or DONE."""
    honest = HintReport._send_command
    ended = []
    honest_end = HintReport.end

    def send_command(report, token, value):
        return False if token == STOP_TOKEN and not ended else honest(report, token, value)

    def end(report):
        if threading.current_thread().name != "balloon" or report._phase is not Phase.CLOSING:
            honest_end(report)
        ended.append(True)

    HintReport._send_command, HintReport.end = send_command, end
