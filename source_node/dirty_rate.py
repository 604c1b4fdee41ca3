"""The answer to MeasureDirtyRate: samples of the dirty log, and what the guest's memory consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from host.dirty_rate import looks_at, measure
from host.errors import TrackerUnavailable
from host.roles import RoleRefused
from migration.pb import node_pb2

if TYPE_CHECKING:
    from host.context import HostContext
    from host.dirty_rate import Waits


def measured_dirty_rate(
    host: HostContext, period_ms: int, periods: int, stopping: Waits
) -> node_pb2.DirtyRateReply:
    """Measure now; the caller sees to it that nothing else tracks the guest meanwhile.

    Raises:
        RoleRefused: the host is stopping, or the dirty log cannot be read.
    """
    guest = host.guest
    assert guest.ram is not None, "a guest that runs here has its memory here"
    looks, name = looks_at(guest.ram, guest.scanner, host.device_log)
    host.events.add("dirty_rate_started", period_ms=period_ms, periods=periods, tracker=name)
    try:
        found = measure(looks, name, period_ms, periods, stopping)
    except TrackerUnavailable as error:
        raise RoleRefused(str(error)) from error
    if not found.cumulative_pages:
        raise RoleRefused("the host is stopping")
    ballooned = host.balloon.ballooned(guest.ram.pages)
    reply = node_pb2.DirtyRateReply(
        dirtied_pages=found.dirtied_pages,
        period_ms=found.period_ms,
        cumulative_pages=found.cumulative_pages,
        working_set_pages=found.cumulative_pages[-1],
        hintable_pages=guest.hello().free_pages,
        populated_pages=int(np.count_nonzero(guest.ram.populated())),
        ballooned_pages=ballooned.count,
        pages=guest.ram.pages,
        tracker=name,
    )
    host.events.add(
        "dirty_rate_measured",
        dirtied_pages=list(found.dirtied_pages),
        period_ms=[round(period, 3) for period in found.period_ms],
        working_set_pages=reply.working_set_pages,
        hintable_pages=reply.hintable_pages,
        populated_pages=reply.populated_pages,
    )
    return reply
