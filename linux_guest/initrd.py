"""The guest's whole file system: busybox, the kernel's balloon driver, and an init that obeys.

Rule 1: init reads one command a line from the first serial line and answers with the output, then a line of
        `END` and the status. It never ends by itself, and a command cannot make it.
Rule 2: the second serial line is the guest's clock: a number that grows by one, every few milliseconds.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from linux_guest import cpio

if TYPE_CHECKING:
    from linux_guest.packages import Programs

READY: Final = "ballast-guest-is-up"
END: Final = "ballast-command-ended"
BALLOON_PATH: Final = "/lib/virtio_balloon.ko"
BEAT_US: Final = 5000  # the guest's timer has 10 ms; more often is as often as it can

# A command runs in a subshell: neither a syntax error nor `exit` ends init, whose end is the kernel's panic.
INIT: Final = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /sys /tmp
/bin/busybox mount -t devtmpfs none /dev
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t tmpfs -o size=95% none /tmp
/bin/busybox --install -s /bin
export PATH=/bin
for line in /dev/ttyS0 /dev/ttyS1; do stty -F $line raw -echo; done
(i=0; while :; do i=$((i+1)); echo $i; usleep {BEAT_US}; done) </dev/null >/dev/ttyS1 2>/dev/null &
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo {READY}
while read -r line; do
  (eval "$line") </dev/null
  echo "
{END} $?"
done
"""


@functools.cache
def build(programs: Programs) -> bytes:
    """The archive that the kernel unpacks."""
    folders = [cpio.directory(name) for name in ("bin", "dev", "lib", "proc", "sys", "tmp")]
    return cpio.archive(
        [
            *folders,
            cpio.character_device("dev/console", 5, 1),
            cpio.program("bin/busybox", programs.busybox.read_bytes()),
            cpio.program(BALLOON_PATH.removeprefix("/"), programs.module_bytes()),
            cpio.program("init", INIT.encode()),
        ]
    )
