"""Stock Linux guests of other kinds: one that zeroes what it frees, and one whose device offers less."""

import numpy as np
import pytest

from linux_guest.frame_table import HELD
from tests.interop.stock_guest import needs_linux, stock_guest, wait_until
from virtio.balloon import F_FREE_PAGE_HINT, F_PAGE_POISON, F_REPORTING, F_STATS_VQ, has, mask
from virtio.balloon_device import FEATURES_DEFAULT

pytestmark = needs_linux

MEMORY_BYTES = 192 << 20


def test_a_guest_that_zeroes_what_it_frees_promises_zero_and_may_be_hinted(tmp_path):
    with stock_guest(tmp_path, memory_bytes=MEMORY_BYTES, parameters=("init_on_free=1",)) as guest:
        status = guest.device.status()
        assert has(status.features, F_PAGE_POISON)
        assert status.poison_value == 0
        guest.linux.sh("dd if=/dev/urandom of=/tmp/fill bs=1M count=64 2>/dev/null; rm /tmp/fill")
        guest.report()
        hinted = np.flatnonzero(guest.hinted())
        assert len(hinted) > 0
        sample = hinted[:: max(1, len(hinted) // 200)]
        assert not any(any(guest.ram.read(int(pfn) * 4096, 4096)) for pfn in sample), (
            "a skipped page reads as promised"
        )
        guest.end_report()
        assert guest.device.status().guest_errors == {}


@pytest.mark.parametrize(
    ("without", "numbering"),
    [
        (mask(F_STATS_VQ), "packed"),
        (mask(F_STATS_VQ, F_FREE_PAGE_HINT), "packed"),
        (mask(F_REPORTING), "same"),
    ],
    ids=["no-stats", "reporting-only", "no-reporting"],
)
def test_queues_are_found_however_few_there_are(tmp_path, without, numbering):
    """Linux numbers its queues without gaps: without statistics, hints come on ring 2."""
    features = FEATURES_DEFAULT & ~without
    with stock_guest(tmp_path, memory_bytes=MEMORY_BYTES, features=features) as guest:
        guest.balloon(1000)
        guest.balloon(0)
        if not has(without, F_FREE_PAGE_HINT):
            guest.report()
            assert (guest.hinted() == (guest.kinds() == HELD)).all()
            assert guest.hinted().any()
            guest.end_report()
        status = guest.device.status()
        assert status.queue_numbering == numbering
        assert status.guest_errors == {}


def test_free_page_reporting_gives_memory_back_to_the_host(tmp_path):
    with stock_guest(tmp_path, memory_bytes=MEMORY_BYTES) as guest:
        assert has(guest.device.status().features, F_REPORTING)
        guest.linux.sh("dd if=/dev/urandom of=/tmp/fill bs=1M count=100 2>/dev/null", 60)
        full, before = guest.ram.resident_bytes(), guest.device.status()
        guest.linux.sh("rm /tmp/fill")
        wait_until(lambda: guest.ram.resident_bytes() < full - (60 << 20), "most of 100 MiB leaves the host")
        after = guest.device.status()
        assert after.reported_pages - before.reported_pages >= (60 << 20) // 4096
        assert after.released_pages - before.released_pages == after.reported_pages - before.reported_pages
        assert after.guest_errors == {}
