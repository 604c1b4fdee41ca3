"""What can go wrong on a host, by whose fault it is.

Rule 1: every error of this package derives from HostError and says in one line what happened.
Rule 2: "the agent said no" (AgentError) and "the agent cannot be heard" (AgentLost) are different facts.
Rule 3: a guest that breaks the standard raises nothing here: it is counted where it did so.
"""

from __future__ import annotations


class HostError(Exception):
    """Base of all errors of this package; never raised itself."""


class GuestMemoryError(HostError):
    """A page range outside guest RAM, or a descriptor that cannot be guest RAM."""


class AgentError(HostError):
    """The guest agent answered, and refused or failed the operation."""

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"guest agent refused {operation!r}: {reason}")
        self.operation = operation
        self.reason = reason


class AgentLost(HostError):
    """The guest agent cannot be reached: no socket, no answer in time, or garbage on the link."""


class TrackerUnavailable(HostError):
    """The dirty tracker that was asked for cannot work here; `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DeviceNotReady(HostError):
    """The balloon device was asked for what needs a driver, and none is up."""


class DeviceStateUnreadable(HostError):
    """The file that keeps the balloon device across restarts is there and makes no sense."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"device state {path}: {reason}; remove it to start with a device that is new to its guest"
        )


class LoopEnded(HostError):
    """A thread of this host was asked for something after it had been stopped, or had failed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the thread {name!r} has ended")


class JournalConflict(HostError):
    """A transition was refused, because the attempt is not in a state that it may leave."""


class JournalLocked(HostError):
    """Another process holds the journal; a hung process and its replacement must never both act."""

    def __init__(self, path: str, holder_pid: int | None) -> None:
        by = "another process" if holder_pid is None else f"process {holder_pid}"
        super().__init__(f"journal {path} is held by {by}")
        self.path = path
        self.holder_pid = holder_pid
