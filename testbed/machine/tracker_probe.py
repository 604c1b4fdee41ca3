"""Tries the kernel's dirty tracking once.

`python -m testbed.machine.tracker_probe` prints why it fails, or nothing.

Rule 1: it goes the way of a run: guest RAM as the agent makes it, scanned as a host scans it.
"""

import os
import sys

from guest_agent.ram import GuestRam
from host.errors import TrackerUnavailable
from host.pagemap import WriteScanner

PAGES = 64
WRITTEN_PFN = 17


def main() -> str:
    """The reason why tracking does not work here, or ""."""
    ram = GuestRam.create(PAGES * 4096)
    tracking = ram.protect()
    if tracking.pagemap_fd is None:
        return tracking.reason
    scanner = WriteScanner(os.dup(tracking.pagemap_fd), ram.base_address, ram.pages)
    try:
        scanner.scan_and_protect()
        ram.bytes[WRITTEN_PFN, 0] = 1
        found = scanner.scan_and_protect().pfns().tolist()
    except TrackerUnavailable as error:
        return str(error)
    finally:
        scanner.close()
    return "" if found == [WRITTEN_PFN] else f"page {WRITTEN_PFN} was written and the kernel reports {found}"


if __name__ == "__main__":
    sys.stdout.write(main())
