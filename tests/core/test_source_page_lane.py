"""What the thread of a lost page stream still does when the link is back already changes no count."""

from types import SimpleNamespace

import numpy as np
import pytest

from host.guest_memory import HostRam
from source_node.page_lane import Marker, OpenCall, PageLane, Part
from source_node.page_reader import PageReader

CHUNK_PAGES = 16


class Owner:
    over = False

    def part_read(self, part):
        pass

    def lane_acknowledged(self):
        raise AssertionError("nothing was acknowledged")

    def lane_lost(self, reason, *, refused):
        raise AssertionError(f"lost: {reason}, {refused}")


@pytest.fixture
def lane():
    ram = HostRam.create(1 << 20)
    reader = PageReader(ram, incarnation="i", attempt=1, detects_zero=False)
    channel = SimpleNamespace(stream_stream=lambda *_, **__: None)
    made = PageLane(
        0, channel, Owner(), reader, pacer=None, packer=None, chunk_pages=CHUNK_PAGES, window_chunks=16
    )
    made._call = OpenCall(rpc=iter(()))
    yield made
    ram.close()


def rewound_before(step, lane, stored_below):
    """`step`, and its thread comes to it only when the link has been resumed."""

    def late(*arguments):
        lane.rewind(stored_below)
        return step(*arguments)

    return late


def test_a_chunk_that_was_made_before_the_link_was_lost_is_not_counted_after_it_is_back(lane):
    lane.put(Part(1, np.arange(5 * CHUNK_PAGES, dtype=np.uint64)))
    messages = lane._requests(lane._call)
    next(messages)
    next(messages)
    lane._count = rewound_before(lane._count, lane, 1)
    assert list(messages) == [], "nothing more goes by the lost call"
    assert (lane.sent, lane.messages) == (1, 2), "the next chunk is number 1, and two messages went"


def test_a_marker_that_was_made_before_the_link_was_lost_is_not_counted_either(lane):
    lane.put(Marker(1))
    lane._count = rewound_before(lane._count, lane, 0)
    assert list(lane._requests(lane._call)) == []
    assert (lane.sent, lane.messages) == (0, 0)
