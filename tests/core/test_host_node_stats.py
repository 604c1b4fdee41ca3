"""The Node service's Stats: fresh numbers of the guest, one event, or one line that says why not."""

from types import SimpleNamespace

import grpc
import pytest

from host.errors import DeviceNotReady
from host.node import NodeService
from migration.pb import node_pb2
from virtio.balloon_stats import GuestStatistics


class Aborted(Exception):
    """What gRPC raises in a servicer that aborts."""


class Context:
    def abort(self, code, details):
        raise Aborted(code, details)


def service(guest_stats):
    added = []
    events = SimpleNamespace(add=lambda name, **fields: added.append((name, fields)))
    host = SimpleNamespace(balloon=SimpleNamespace(guest_stats=guest_stats), events=events)
    return NodeService(host, [], "", None), added


def test_statistics_are_answered_and_become_an_event():
    asked = []

    def guest_stats(timeout):
        asked.append(timeout)
        return GuestStatistics({"memfree": 1 << 40}, unknown_tags=2)

    node, added = service(guest_stats)
    reply = node.Stats(node_pb2.StatsRequest(wait_ms=250), Context())
    assert (dict(reply.values), reply.unknown_tags) == ({"memfree": 1 << 40}, 2)
    assert added == [("guest_stats", {"memfree": 1 << 40})]
    node.Stats(node_pb2.StatsRequest(), Context())
    assert asked == [0.25, 2.0]


def test_a_guest_without_statistics_is_said_so():
    def guest_stats(_timeout):
        raise DeviceNotReady("no guest driver with a statistics queue is up")

    node, added = service(guest_stats)
    with pytest.raises(Aborted) as told:
        node.Stats(node_pb2.StatsRequest(), Context())
    assert told.value.args == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "no guest driver with a statistics queue is up",
    )
    assert added == []
