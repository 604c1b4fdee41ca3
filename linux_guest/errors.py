"""What can go wrong with a Linux guest, sorted by who has to act.

Rule 1: a message is one line that names what is missing or what happened, and what to do.
"""

from __future__ import annotations


class LinuxGuestError(Exception):
    """Base; never raised itself."""


class PackagesMissingError(LinuxGuestError):
    """Programs are not installed; `packages` are the Debian packages that bring them."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        super().__init__(f"a Linux guest needs Debian's packages: apt-get install {' '.join(packages)}")
        self.packages = packages


class FreezerUnavailableError(LinuxGuestError):
    """No cgroup freezer can be used here."""


class GuestSilentError(LinuxGuestError):
    """The guest did not say in time what was waited for, or ended; its last lines are in the message."""


class FrameTableError(LinuxGuestError):
    """The guest kernel's frame table cannot be read, or does not agree with what the guest says itself."""


class WorkloadError(LinuxGuestError):
    """A Linux guest has no such workload, or the workload no such option."""
