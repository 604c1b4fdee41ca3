"""What can go wrong in the virtio package, and whose fault it is.

Rule 1: `LocalVirtioError` means this process asked for something illegal: fix the caller.
Rule 2: `RemoteVirtioError` and its children mean the peer or the guest sent something illegal: count it,
        act as the standard says, and go on serving everyone else. Nothing a peer sends may trip an `assert`.
Rule 3: every remote error carries a `kind`, a short stable word that counters are keyed by.
"""

from __future__ import annotations


class VirtioError(Exception):
    """Base of everything raised here; never raised itself."""


class LocalVirtioError(VirtioError):
    """This process asked for something illegal."""


class RingFull(VirtioError):
    """The ring has too few free descriptors for this chain; take used buffers back and try again."""


class RemoteVirtioError(VirtioError):
    """The other side broke the rules.

    Attributes:
        kind: short stable word for counters, such as "chain_loop".
        detail: the numbers that show it, for one log line.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class GuestProtocolError(RemoteVirtioError):
    """A driver (the guest) broke the rules of a ring or of the balloon."""


class DeviceProtocolError(RemoteVirtioError):
    """A device broke the rules of a ring, seen from the driver."""


class VhostUserError(RemoteVirtioError):
    """The other end of a vhost-user socket sent something illegal; the connection is of no more use."""


class SidebandError(RemoteVirtioError):
    """A message on the node's small socket to its guest agent was malformed."""
