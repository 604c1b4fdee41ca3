"""The split virtqueue, both sides: the names other packages use (virtio 1.2 section 2.7)."""

from __future__ import annotations

from virtio.device_ring import Chain, DeviceRing
from virtio.driver_ring import DriverRing, Used
from virtio.ring_layout import Buffer, RingLayout, check_layout, layout_at, ring_bytes

__all__ = [
    "Buffer",
    "Chain",
    "DeviceRing",
    "DriverRing",
    "RingLayout",
    "Used",
    "check_layout",
    "layout_at",
    "ring_bytes",
]
