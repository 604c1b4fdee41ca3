"""A guest's memory under write tracking, in a process of its own; one order per line (test_host_trackers)."""

import os
import sys

from guest_agent.ram import GuestRam


def main() -> None:
    """Serve orders until stdin ends: ram | write PFN... | stride FIRST END STEP."""
    ram = GuestRam.adopt(int(sys.argv[1]), int(sys.argv[2]))
    tracking = ram.protect()
    for line in sys.stdin:
        order, *numbers = line.split()
        if order == "ram":
            answer = f"{ram.base_address} {tracking.pagemap_fd} {tracking.reason}"
        elif order == "write":
            for pfn in numbers:
                ram.words[int(pfn), 0] += 1
            answer = "done"
        else:
            first, end, step = map(int, numbers)
            ram.words[first:end:step, 0] += 1
            answer = "done"
        os.write(1, f"{answer}\n".encode())


if __name__ == "__main__":
    main()
