"""vhost-user, both ends: the names other packages use.

The messages are in `vhost_user_messages`, the device's end in `vhost_user_backend`, what that has its caller do in
`vhost_user_effects`, the guest's end in `vhost_user_frontend`.
"""

from __future__ import annotations

from virtio.vhost_user_backend import BackendSession
from virtio.vhost_user_effects import (
    BackendChannel,
    CloseFds,
    ConfigWritten,
    Effect,
    FeaturesSet,
    MapRegion,
    Reply,
    RingFdsChanged,
    StartRing,
    StopRing,
)
from virtio.vhost_user_frontend import (
    Action,
    BackendReply,
    ConfigRead,
    ConfigWriteDone,
    Event,
    FrontendSession,
    Negotiated,
    RingSetup,
    RingsStarted,
    RingsStopped,
)
from virtio.vhost_user_messages import (
    FDS_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    BackendRequest,
    MemoryRegion,
    Message,
    Request,
    decode,
    decode_header,
)

__all__ = [
    "FDS_MAX",
    "HEADER_BYTES",
    "PAYLOAD_BYTES_MAX",
    "Action",
    "BackendChannel",
    "BackendReply",
    "BackendRequest",
    "BackendSession",
    "CloseFds",
    "ConfigRead",
    "ConfigWriteDone",
    "ConfigWritten",
    "Effect",
    "Event",
    "FeaturesSet",
    "FrontendSession",
    "MapRegion",
    "MemoryRegion",
    "Message",
    "Negotiated",
    "Reply",
    "Request",
    "RingFdsChanged",
    "RingSetup",
    "RingsStarted",
    "RingsStopped",
    "StartRing",
    "StopRing",
    "decode",
    "decode_header",
]
