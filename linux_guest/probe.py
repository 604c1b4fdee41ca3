"""What stands in the way of a Linux guest on this machine, found out by trying.

Rule 1: every answer is "" or one line that says what to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from linux_guest import freezer, packages

PROBE_S: Final = 20.0  # a kernel that does nothing ends in a second


def programs() -> str:
    """The packages that bring kernel, balloon driver and file system."""
    return packages.missing()


def namespace() -> str:
    """A PID namespace, in which everything of a guest ends with it."""
    told, tell = os.pipe()
    command = [sys.executable, "-m", "linux_guest.launch", "--pids", str(tell), "--", "true"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_S, check=False, pass_fds=(tell,)
        )
    except subprocess.TimeoutExpired:
        return f"a process in a PID namespace did not end within {PROBE_S:g} s"
    finally:
        os.close(told)
        os.close(tell)
    if done.returncode == 0:
        return ""
    reason = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return f"a Linux guest runs in a PID namespace of its own, which needs root: {reason[0]}"


def freezing() -> str:
    """A control group freezer, with which a guest is paused."""
    reason = freezer.unavailable()
    return f"pausing a Linux guest needs the cgroup freezer: {reason}" if reason else ""
