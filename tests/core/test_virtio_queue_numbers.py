"""Which queue a ring means: read off what a front-end sets up."""

import itertools

import pytest

from virtio.balloon import (
    F_FREE_PAGE_HINT,
    F_REPORTING,
    F_STATS_VQ,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    QUEUE_STATS,
    mask,
)
from virtio.queue_numbers import QueueNumbers

OPTIONAL = {F_STATS_VQ: QUEUE_STATS, F_FREE_PAGE_HINT: QUEUE_HINT, F_REPORTING: QUEUE_REPORTING}
FEATURE_SETS = [chosen for count in range(4) for chosen in itertools.combinations(OPTIONAL, count)]


def queues_of(chosen):
    return [QUEUE_INFLATE, QUEUE_DEFLATE, *(OPTIONAL[feature] for feature in chosen)]


@pytest.mark.parametrize("chosen", FEATURE_SETS, ids=str)
def test_linux_packed_numbers_are_understood_as_they_come(chosen):
    numbers = QueueNumbers(mask(*chosen))
    for ring, queue in enumerate(queues_of(chosen)):
        numbers.set_up(ring)
        assert numbers.queue_of(ring) == queue


@pytest.mark.parametrize("chosen", FEATURE_SETS, ids=str)
@pytest.mark.parametrize("ascending", [True, False])
def test_the_standards_numbers_are_understood_in_either_order(chosen, ascending):
    numbers = QueueNumbers(mask(*chosen))
    for queue in sorted(queues_of(chosen), reverse=not ascending):
        numbers.set_up(queue)
        assert numbers.queue_of(queue) == queue
    assert numbers.numbering in ("fixed", "same")


def test_before_any_evidence_only_what_both_agree_on_has_a_meaning():
    numbers = QueueNumbers(mask(F_STATS_VQ, F_REPORTING))
    assert numbers.numbering == "undecided"
    assert [numbers.queue_of(ring) for ring in range(5)] == [
        QUEUE_INFLATE,
        QUEUE_DEFLATE,
        QUEUE_STATS,
        None,
        None,
    ]


def test_a_front_end_that_sets_up_every_ring_has_the_standards_numbers():
    """Whatever it negotiated: a packed driver has no ring 4 here."""
    numbers = QueueNumbers(mask(F_FREE_PAGE_HINT, F_REPORTING))
    for ring in range(5):
        numbers.set_up(ring)
    assert numbers.numbering == "fixed"
    assert [numbers.queue_of(ring) for ring in range(5)] == [0, 1, None, QUEUE_HINT, QUEUE_REPORTING]


def test_a_queue_that_was_not_negotiated_has_no_ring():
    numbers = QueueNumbers(mask(F_STATS_VQ))
    assert (numbers.numbering, numbers.queue_of(QUEUE_HINT), numbers.queue_of(99)) == ("same", None, None)
