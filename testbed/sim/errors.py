"""What ends a simulated step, and what a simulated host says instead of what the real one would."""

from __future__ import annotations

from dest_node.outcomes import IntakeRefused
from migration.errors import RemoteProtocolError


class ViolationError(Exception):
    """An invariant does not hold; the message says which and how."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant


class ProcessDied(Exception):
    """The process that is carrying something out was killed at this very point."""


class AgentRefused(Exception):
    """The guest agent said no."""


class AgentGone(Exception):
    """The guest agent cannot be reached."""


class DeviceNotReady(Exception):
    """No guest driver is up."""


class JournalRefused(Exception):
    """A transition from a state that the attempt is not in."""


class JournalFull(Exception):
    """The journal could not be written; what was to be written may be there all the same."""


class CallRefused(Exception):
    """The destination answered a call with no."""


REFUSALS = (
    CallRefused,
    IntakeRefused,
    RemoteProtocolError,
    AgentRefused,
    AgentGone,
    JournalRefused,
    JournalFull,
)
