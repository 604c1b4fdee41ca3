"""One page stream: what it books and sends again; what the thread of a lost one still does changes no count."""

from types import SimpleNamespace

import numpy as np
import pytest

from host.guest_memory import HostRam
from migration.errors import RemoteProtocolError
from source_node.packer import PackingOrder, packers
from source_node.page_lane import GRPC_PREFIX_BYTES, REPAIR_PAGES, Marker, OpenCall, PageLane, Part
from source_node.page_reader import PageReader

CHUNK_PAGES = 16
RAM_BYTES = 32 << 20


class Owner:
    over = False

    def part_read(self, part):
        pass

    def lane_acknowledged(self):
        raise AssertionError("nothing was acknowledged")

    def lane_lost(self, reason, *, refused):
        raise AssertionError(f"lost: {reason}, {refused}")


@pytest.fixture
def ram():
    made = HostRam.create(RAM_BYTES)
    yield made
    made.close()


def lane_of(ram, **parts):
    """A lane whose call was made and answers nothing."""
    reader = PageReader(ram, incarnation="i", attempt=1, detects_zero=False)
    channel = SimpleNamespace(stream_stream=lambda *_, **__: None)
    chosen = {"pacer": None, "packer": None, "chunk_pages": CHUNK_PAGES, "window_chunks": 16} | parts
    made = PageLane(0, channel, Owner(), reader, **chosen)
    made._call = OpenCall(rpc=iter(()))
    return made


@pytest.fixture
def lane(ram):
    return lane_of(ram)


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


def lost_with(lane, chunks):
    """So many chunks went by its call, and the connection is lost."""
    lane.put(Part(1, np.arange(chunks * lane._numbers.chunk_pages, dtype=np.uint64)))
    messages = lane._requests(lane._call)
    for _ in range(chunks):
        next(messages)


def test_what_is_sent_again_goes_in_pieces_first_and_ascending(ram):
    chunk_pages = REPAIR_PAGES // 2
    lane = lane_of(ram, chunk_pages=chunk_pages)
    lost_with(lane, 6)
    waiting = Part(2, np.array([7], np.uint64))
    lane.put(waiting)
    assert lane.rewind(1).tolist() == list(range(chunk_pages, 6 * chunk_pages))
    *repairs, last = lane._works
    assert last is waiting
    assert [(part.is_repair, part.round_index, int(part.pfns[0]), part.pfns.size) for part in repairs] == [
        (True, 1, chunk_pages, REPAIR_PAGES),
        (True, 1, chunk_pages + REPAIR_PAGES, REPAIR_PAGES),
        (True, 1, chunk_pages + 2 * REPAIR_PAGES, chunk_pages),
    ]
    assert lane.resent_pages == 5 * chunk_pages


def test_no_delta_is_made_against_a_page_that_may_not_have_arrived(ram):
    (packer,) = packers(PackingOrder("none", RAM_BYTES), 1, ram.pages)
    lane = lane_of(ram, packer=packer)
    ram.memory[:] = bytes([1]) * RAM_BYTES
    lost_with(lane, 3)
    lane.rewind(1)
    known = packer._cache.known(np.arange(3 * CHUNK_PAGES, dtype=np.uint64))
    assert np.flatnonzero(known).tolist() == list(range(CHUNK_PAGES)), "of the chunk that is stored"


def test_an_acknowledgement_neither_goes_back_nor_ahead_of_what_was_sent(lane):
    lost_with(lane, 4)
    lane._acknowledge(2)
    for stored_below in (1, 5):
        with pytest.raises(RemoteProtocolError, match="cannot be"):
            lane._acknowledge(stored_below)
    lane._acknowledge(4)
    assert not lane._kept


def test_the_bandwidth_is_asked_for_every_byte_of_a_message(ram):
    asked = []
    pacer = SimpleNamespace(reserve=lambda count: asked.append(count) or 0)
    lane = lane_of(ram, pacer=pacer)
    lane.put(Part(1, np.arange(2 * CHUNK_PAGES, dtype=np.uint64)))
    messages = lane._requests(lane._call)
    lengths = [len(next(messages)) for _ in range(2)]
    assert asked == [length + GRPC_PREFIX_BYTES for length in lengths]
    assert lane.grpc_bytes == sum(asked)
