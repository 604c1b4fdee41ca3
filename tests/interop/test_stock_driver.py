"""The stock Linux driver (User-Mode Linux 6.1) on our balloon device: each feature, as both sides see it.

One guest serves the whole file: every test leaves it as it found it, with an empty balloon and nothing held.
"""

import numpy as np
import pytest

from linux_guest.frame_table import BALLOONED, FREE, HELD, HINT_BLOCK_PAGES, USED
from tests.interop.stock_guest import PAGE_BYTES, StockGuest, needs_linux, stock_guest
from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_STATS_VQ,
    F_VERSION_1,
    mask,
)
from virtio.balloon_device import FEATURES_DEFAULT

pytestmark = needs_linux

MEMORY_BYTES = 512 << 20
# A block that is being reported is in nobody's list, and is not hinted: reporting has a guest of its own.
WITHOUT_REPORTING = FEATURES_DEFAULT & ~mask(F_REPORTING)
BALLOON_PAGES = 40_000
MARKER_PAGES = 16_384  # 64 MiB: most of it lies in blocks that are whole once it is gone
# Blocks of 4 MiB that are whole are 94 to 99 % of an idle guest's free memory.
HINTED_SHARE = 0.94


@pytest.fixture(name="guest", scope="module")
def fixture_guest(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uml")
    with stock_guest(directory, memory_bytes=MEMORY_BYTES, features=WITHOUT_REPORTING) as guest:
        yield guest


@pytest.fixture(autouse=True)
def _nothing_is_left(guest: StockGuest):
    yield
    status = guest.device.status()
    assert status.guest_errors == {}, "the stock driver breaks no rule"
    assert status.connection_errors == {}
    assert status.actual == status.num_pages == 0
    assert not np.isin(guest.kinds(), (BALLOONED, HELD)).any()


def test_the_driver_takes_what_it_knows_and_nothing_else(guest):
    accepted = guest.device.status().features
    known = mask(F_MUST_TELL_HOST, F_STATS_VQ, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_VERSION_1)
    assert accepted & known == known
    # Without init_on_free the driver has no value to promise, and says so by not taking the feature.
    assert not accepted & mask(F_PAGE_POISON)


def test_the_frame_table_that_the_tests_rely_on_is_the_guests_own(guest):
    guest.frames.check_against(guest.linux)
    free_pages = int(np.count_nonzero(guest.kinds() == FREE))
    assert abs(free_pages - guest.free_bytes() // PAGE_BYTES) < 1000, "MemFree counts CPU lists as well"


def test_hinting_covers_the_idle_guests_memory_and_holds_exactly_what_was_hinted(guest):
    free_pages = guest.free_bytes() // PAGE_BYTES
    guest.report()
    hinted, held = guest.hinted(), guest.kinds() == HELD
    assert hinted.sum() >= HINTED_SHARE * free_pages
    assert hinted.sum() % HINT_BLOCK_PAGES == 0
    assert (hinted == held).all(), "the guest's own list of held blocks is what the device was told"
    assert guest.free_bytes() // PAGE_BYTES <= free_pages - hinted.sum() + HINT_BLOCK_PAGES
    guest.end_report()
    assert guest.free_bytes() // PAGE_BYTES >= free_pages - HINT_BLOCK_PAGES, "DONE gives it all back"


def test_inflated_pages_leave_the_host_and_deflating_gives_every_one_of_them_back(guest):
    guest.log.take()
    # Every page of the balloon has had content before, so that leaving shows.
    guest.linux.sh("dd if=/dev/urandom of=/tmp/fill bs=1M count=300 2>/dev/null; rm /tmp/fill", 60)
    before = guest.device.status()
    guest.balloon(BALLOON_PAGES)
    ballooned = np.flatnonzero(guest.kinds() == BALLOONED)
    assert len(ballooned) == BALLOON_PAGES
    assert np.isin(ballooned, guest.log.take()).all(), "the log names every page that was punched"
    content = [guest.ram.read(int(pfn) * PAGE_BYTES, PAGE_BYTES) for pfn in ballooned[:: BALLOON_PAGES // 50]]
    assert not any(any(page) for page in content)
    guest.balloon(0)
    after = guest.device.status()
    assert after.inflated_pages - before.inflated_pages == BALLOON_PAGES
    assert after.deflated_pages - before.deflated_pages == BALLOON_PAGES
    assert not (guest.kinds() == BALLOONED).any()


def test_statistics_are_the_guests_own_to_the_byte(guest):
    seen = []
    for _ in range(20):  # the guest lives meanwhile: both must be told of the same instant
        told = guest.device.guest_stats().values
        seen.append((told["memfree"], guest.free_bytes()))
        if seen[-1][0] == seen[-1][1]:
            break
    else:
        pytest.fail(f"never equal: {seen}")
    info = guest.linux.meminfo()
    assert told["memtot"] == info["MemTotal"]
    assert set(told) >= {"swap_in", "swap_out", "majflt", "minflt", "memfree", "memtot", "avail", "caches"}
    assert guest.device.status().stats_unknown_tags == 0


def test_no_page_that_a_process_owns_is_hinted_and_after_its_end_its_pages_are(guest):
    marker = guest.marker(MARKER_PAGES)
    guest.report()
    assert not guest.hinted()[marker.pfns].any()
    assert (guest.kinds()[marker.pfns] == USED).all()
    guest.end_report()
    assert not marker.problems()
    marker.end()
    guest.linux.sh("echo 1 >/proc/sys/vm/compact_memory")
    free = guest.kinds() == FREE
    assert free[marker.pfns].mean() > 0.9, "a few wait on the CPU's own list, or were given away again"
    in_whole_blocks = marker.pfns[
        np.repeat(free.reshape(-1, HINT_BLOCK_PAGES).all(axis=1), HINT_BLOCK_PAGES)[marker.pfns]
    ]
    assert len(in_whole_blocks) > len(marker.pfns) // 4
    guest.report()
    hinted = guest.hinted()[in_whole_blocks]
    guest.end_report()
    assert hinted.mean() > 0.9, "only blocks of 4 MiB that are whole are hinted, and nearly all of those"


def test_pressure_before_done_takes_hinted_pages_back(guest):
    """Hazard 1 with the stock driver: live pages inside the still open hinted set. The device left them alone."""
    guest.report()
    hinted = guest.hinted()
    pages = guest.pages // 4
    marker = guest.marker(pages)
    taken_back = int(hinted[marker.pfns].sum())
    assert taken_back > pages // 2, "the shrinker gave held blocks back"
    # Wherever they stand now: a kernel that is short of memory moves pages together.
    assert not marker.find_again(), "a hinted page was touched by the host"
    guest.end_report()
    assert not marker.find_again()
    marker.end()


def test_hints_that_come_after_the_id_was_closed_never_count(guest):
    for _ in range(10):
        guest.batches.clear()
        guest.device.open_hints()
        closed = guest.device.close_hints()  # the guest's only CPU has hardly heard of the id
        early = sum(int(batch.page_count.sum()) for batch in [*guest.batches, closed])
        guest.linux.sh("true")  # whatever the guest had to say is said
        late = sum(int(batch.page_count.sum()) for batch in [*guest.batches, closed])
        assert late == early
    guest.end_report()  # what the guest hinted too late it holds all the same
    guest.report()
    assert guest.hinted().any(), "and the next report is a good one"
    guest.end_report()


def test_an_id_that_is_shown_again_is_not_answered_again(guest):
    guest.report()
    batches = len(guest.batches)
    for _ in range(3):
        guest.device._loop.call(guest.device._announce)  # the same configuration, a new interrupt
        guest.linux.sh("true")
    assert len(guest.batches) == batches
    guest.device.close_hints()
    guest.report()
    assert guest.hinted().sum() < HINT_BLOCK_PAGES * 8, "what is held already is not free again"
    guest.end_report()


def test_deflate_on_oom_gives_pages_back_before_a_process_dies(guest):
    spare_bytes = 64 << 20
    balloon = (guest.free_bytes() - spare_bytes) // PAGE_BYTES
    guest.balloon(balloon)
    marker = guest.marker(2 * spare_bytes // PAGE_BYTES)
    status = guest.device.status()
    assert status.actual < balloon
    assert not marker.find_again()
    marker.end()
    guest.balloon(0)
    assert guest.linux.sh("dmesg | grep -c 'Killed process' || true").strip() == "0"


def test_a_driver_that_is_unloaded_and_loaded_again_finds_the_same_device(guest):
    guest.balloon(1000)
    guest.balloon(0)
    for _ in range(2):
        guest.linux.unload_balloon()
        guest.load()
        guest.balloon(3000)
        assert np.count_nonzero(guest.kinds() == BALLOONED) == 3000
        guest.balloon(0)
        guest.report()
        assert guest.hinted().any()
        guest.end_report()
        assert guest.device.guest_stats().values["memtot"] > 0
