"""What can go wrong inside a guest agent.

Rule 1: every error raised on purpose derives from GuestAgentError; a bare assert states our own invariant.
Rule 2: the message is one line with the values that decided, fit for a log and for the node's reply.
"""


class GuestAgentError(Exception):
    """Base of the package's errors; never raised itself."""


class OutOfMemory(GuestAgentError):
    """An allocation fell short after every pressure hook had been asked."""


class RestoreError(GuestAgentError):
    """A memory image or a saved state is not one that this agent can run."""


class OracleError(GuestAgentError):
    """An oracle log is not a whole number of well-formed records."""


class WorkloadError(GuestAgentError):
    """A workload's options are invalid, or its set-up cannot be done in this guest."""


class XBitmapError(GuestAgentError):
    """A sparse bitmap could not get what it needs; it is as it was."""


class OperationRefused(GuestAgentError):
    """The node asked for something that the agent's state does not allow; nothing was changed."""


class PauseTimeout(OperationRefused):
    """A guest thread did not come to a safe point in time; the guest goes on."""


class GateShut(GuestAgentError):
    """The agent ends; a guest thread that meets this ends too."""
