"""The ring area: nothing of it overlaps, nothing leaves it, and its places never move."""

from itertools import pairwise

from guest_agent.boot import RING_PAGES
from guest_agent.ring_area import ARRAY_SLOTS, PFN_ARRAY_BYTES, RING_SIZES, RingArea
from virtio.balloon import CMD_ID_BYTES, QUEUE_COUNT, QUEUE_DEFLATE, QUEUE_HINT, QUEUE_INFLATE
from virtio.split_ring import ring_bytes

BASE = 4096


def spans() -> list[tuple[int, int]]:
    area = RingArea(BASE)
    found = [
        (ring.desc, ring.desc + ring_bytes(RING_SIZES[queue])) for queue, ring in enumerate(area.layouts)
    ]
    found += [(area.command_slot(slot), area.command_slot(slot) + CMD_ID_BYTES) for slot in range(2)]
    for queue in (QUEUE_INFLATE, QUEUE_DEFLATE):
        starts = [area.array_slot(queue, slot) for slot in range(ARRAY_SLOTS)]
        found += [(start, start + PFN_ARRAY_BYTES) for start in starts]
    return sorted(found)


def test_parts_do_not_overlap_and_stay_inside() -> None:
    parts = spans()
    assert parts[0][0] == BASE
    assert all(end <= start for (_, end), (start, _) in pairwise(parts))
    assert parts[-1][1] <= BASE + RING_PAGES * 4096


def test_rings_start_on_pages_of_their_own() -> None:
    layouts = RingArea(BASE).layouts
    assert len(layouts) == QUEUE_COUNT
    assert all(ring.desc % 4096 == 0 for ring in layouts)
    assert layouts[QUEUE_HINT].size == 1024, (
        "all blocks of a 4 GiB guest but one, and its id, are in flight at once"
    )


def test_places_never_move_because_images_of_other_hosts_have_them() -> None:
    area = RingArea(BASE)
    assert [ring.desc for ring in area.layouts] == [4096, 12288, 20480, 28672, 57344]
    assert (area.command_slot(0), area.array_slot(QUEUE_INFLATE, 0), area.array_slot(QUEUE_DEFLATE, 0)) == (
        65536,
        69632,
        86016,
    )
