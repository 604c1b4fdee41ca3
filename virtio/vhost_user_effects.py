"""What the back-end's side of a vhost-user connection has its caller do: imperatives, frozen, one closed union.

Whose descriptors they carry, and in which order they come, is in vhost_user_backend.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from virtio.vhost_user_messages import NO_FD

if TYPE_CHECKING:
    from virtio.ring_layout import RingLayout


@dataclass(frozen=True, slots=True)
class Reply:
    """Send these bytes back on the connection."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MapRegion:
    """Map `fd`, which is yours now, instead of whatever was mapped before.

    Guest address == offset into the file, so map it from 0 to `guest_address + size`; `size` bytes from
    `guest_address` on are guest RAM. Check the file's size before you map it.
    """

    fd: int
    guest_address: int
    size: int


@dataclass(frozen=True, slots=True)
class FeaturesSet:
    """The driver accepted these device features (bit 30, the transport's, is not among them)."""

    features: int


@dataclass(frozen=True, slots=True)
class StartRing:
    """Serve this ring from now on: `kick_fd` tells of new chains, `call_fd` interrupts (-1: poll, don't).

    Look into the ring at once: chains may wait whose kick went to a device before you.
    """

    index: int
    layout: RingLayout
    base: int
    kick_fd: int
    call_fd: int
    err_fd: int = NO_FD


@dataclass(frozen=True, slots=True)
class RingFdsChanged:
    """A running ring has other descriptors now."""

    index: int
    kick_fd: int
    call_fd: int
    err_fd: int = NO_FD


@dataclass(frozen=True, slots=True)
class StopRing:
    """Touch this ring no more, then call `BackendSession.ring_stopped(index, next_avail)`."""

    index: int


@dataclass(frozen=True, slots=True)
class ConfigWritten:
    """The driver wrote `data` at `offset` of the configuration space."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BackendChannel:
    """`fd` (yours now, replacing an earlier one) is the socket for messages to the front-end."""

    fd: int


@dataclass(frozen=True, slots=True)
class CloseFds:
    """Close these descriptors."""

    fds: tuple[int, ...]


Effect = (
    Reply
    | MapRegion
    | FeaturesSet
    | StartRing
    | RingFdsChanged
    | StopRing
    | ConfigWritten
    | BackendChannel
    | CloseFds
)
