"""`rate`: a host's link carries no more than so many bytes a second (token bucket, tbf).

The bucket stands where packets leave, and counts bytes as they are on Ethernet. A link that has a rate already gets
the other one for as long as the fault lasts.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

from testbed.faults import probing, qdisc
from testbed.faults.fault import NetworkFault, is_same_network
from testbed.faults.namespace import inode_of
from testbed.faults.parameters import BytesPerSecond, DurationMs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


def _some(rate: int) -> int:
    if not rate:
        raise ValueError("is no limit; leave the fault out")
    return rate


class Rate(NetworkFault):
    """`rate` in each direction, with a queue of `queue` before packets are dropped."""

    kind: Literal["rate"]
    rate: Annotated[BytesPerSecond, AfterValidator(_some)]
    queue: DurationMs = 50

    @classmethod
    def lacks(cls) -> str:
        """The token bucket."""
        return probing.lacks("rate")

    def apply(self, target: Target) -> Undo:
        """Sets the bucket up where there is none, or changes the one that is ours."""
        buckets: list[dict[str, Any]] = []
        with ExitStack() as undoing:
            for port in target.senders(self.direction):
                before = qdisc.limit(port.pid, port.address, qdisc.Bucket(self.rate, self.queue))
                bucket = {"pid": port.pid, "inode": inode_of(port.pid), "address": port.address}
                bucket["before"] = None if before is None else [before.rate, before.queue_ms]
                undoing.callback(self.heal, {"buckets": [bucket]}, {})
                buckets.append(bucket)
            undoing.pop_all()
        return {"buckets": buckets}

    @classmethod
    def handed_down(cls, undo: Undo, later: Sequence[Undo]) -> Undo:
        """The buckets that no later fault has changed."""
        buckets = [bucket for one in later for bucket in one["buckets"]]
        left = []
        for mine in undo["buckets"]:
            place = mine["inode"], mine["address"]
            heir = next((one for one in buckets if (one["inode"], one["address"]) == place), None)
            if heir is None:
                left.append(mine)
            else:
                heir["before"] = mine["before"]
        return {"buckets": left}

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:  # noqa: ARG003
        """As the link was before."""
        for bucket in undo["buckets"]:
            if is_same_network(bucket["pid"], bucket["inode"]):
                before = qdisc.Bucket(*bucket["before"]) if bucket["before"] else None
                qdisc.restore(bucket["pid"], bucket["address"], before)
        return {}
