"""The driver's rules for moving pages, full queues, and what is still to be found for a target."""

import pytest

from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_SG,
    F_VERSION_1,
    QUEUE_DEFLATE,
    QUEUE_INFLATE,
    BalloonConfig,
    mask,
)
from virtio.balloon_driver import (
    BalloonDriver,
    ConfigChanged,
    DeflatePfns,
    InflatePfns,
    MovePages,
    OutOfMemory,
    Retry,
    Submitted,
    UsedBuffers,
    WriteActual,
)
from virtio.errors import LocalVirtioError


def driver(pages: int = 0, target: int | None = None) -> BalloonDriver:
    """A driver whose balloon holds so many pages and is to hold `target`."""
    made = BalloonDriver(batch_pages=100)
    made.negotiate(mask(F_VERSION_1, F_SG, F_DEFLATE_ON_OOM))
    made.actual = made.num_pages = pages
    if target is not None:
        made.handle(ConfigChanged(BalloonConfig(num_pages=target)))
    return made


def test_f_sg_is_accepted_where_it_is_offered_and_only_there() -> None:
    assert BalloonDriver().negotiate(mask(F_VERSION_1, F_SG)) == mask(F_VERSION_1, F_SG)
    assert BalloonDriver().negotiate(mask(F_VERSION_1)) == mask(F_VERSION_1)


def test_a_move_inflates_the_new_place_first_and_then_deflates_the_old_one() -> None:
    moving = driver(pages=50)
    assert moving.handle(MovePages(3)) == [InflatePfns(3)]
    assert moving.handle(Submitted(QUEUE_INFLATE, 3)) == []
    assert moving.handle(UsedBuffers(QUEUE_DEFLATE)) == []
    assert moving.handle(UsedBuffers(QUEUE_INFLATE)) == [WriteActual(53), DeflatePfns(3)]
    assert moving.handle(Submitted(QUEUE_DEFLATE, 3)) == []
    assert moving.handle(UsedBuffers(QUEUE_DEFLATE)) == [WriteActual(50)]


def test_a_move_completes_also_far_from_the_target() -> None:
    """The balloon wants more pages and memory is short: the old place must go all the same."""
    moving = driver(pages=50, target=80)
    moving.handle(Submitted(QUEUE_INFLATE, 0))
    assert moving.handle(MovePages(1)) == [InflatePfns(1)]
    moving.handle(Submitted(QUEUE_INFLATE, 1))
    assert moving.handle(UsedBuffers(QUEUE_INFLATE)) == [WriteActual(51), DeflatePfns(1)]


def test_nothing_moves_while_an_operation_is_under_way() -> None:
    busy = driver(pages=50, target=80)
    assert busy.handle(MovePages(1)) == []
    busy.handle(Submitted(QUEUE_INFLATE, 30))
    assert busy.handle(MovePages(1)) == []
    assert busy.handle(OutOfMemory()) == []
    busy.handle(UsedBuffers(QUEUE_INFLATE))
    assert busy.handle(MovePages(1)) == [InflatePfns(1)]
    assert busy.handle(OutOfMemory()) == [], "a deflation waits for the move"


def test_a_move_that_was_saved_half_way_is_an_inflation_that_the_target_takes_back() -> None:
    moving = driver(pages=50)
    moving.handle(MovePages(2))
    moving.handle(Submitted(QUEUE_INFLATE, 2))
    restored = BalloonDriver(batch_pages=100)
    restored.restore(moving.save())
    assert restored.handle(UsedBuffers(QUEUE_INFLATE)) == [WriteActual(52), DeflatePfns(2)]


def test_a_full_queue_is_not_a_shortage_of_memory() -> None:
    full = driver(target=90)
    full.handle(Submitted(QUEUE_INFLATE, 40, partial=True))
    assert full.inflation_left == 50
    assert full.handle(UsedBuffers(QUEUE_INFLATE)) == [WriteActual(40), InflatePfns(50)]
    full.handle(Submitted(QUEUE_INFLATE, 10))
    assert full.inflation_left == 0, "short of memory: nobody looks for more"
    assert full.handle(UsedBuffers(QUEUE_INFLATE)) == [WriteActual(50)]
    assert full.handle(Retry()) == [InflatePfns(40)]


def test_what_is_left_to_find_counts_what_is_on_its_way() -> None:
    some = driver(pages=10, target=500)
    assert some.inflation_left == 490, "asked for, and not submitted"
    some.handle(Submitted(QUEUE_INFLATE, 100))
    assert some.inflation_left == 390
    some.handle(ConfigChanged(BalloonConfig(num_pages=60)))
    assert some.inflation_left == 0
    deflating = driver(pages=100, target=40)
    deflating.handle(Submitted(QUEUE_DEFLATE, 60))
    assert deflating.inflation_left == 0


@pytest.mark.parametrize("pages", [-1, 101])
def test_more_than_was_asked_for_is_our_own_mistake(pages: int) -> None:
    with pytest.raises(LocalVirtioError):
        driver(target=100).handle(Submitted(QUEUE_INFLATE, pages))
