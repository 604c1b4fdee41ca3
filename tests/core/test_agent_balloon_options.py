"""What the guest's driver asks for, and the rules of virtio 1.2 section 5.5.3 by which it accepts less."""

import pytest

from guest_agent.balloon_options import BalloonOptions
from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_HINT_WAIT_ON_ACK,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_SG,
    F_STATS_VQ,
    F_VERSION_1,
    has,
    mask,
)
from virtio.balloon_driver import BalloonDriver

EVERYTHING = (1 << 40) - 1


def accepted(options: BalloonOptions, offered: int = EVERYTHING) -> int:
    driver = BalloonDriver(
        wanted=options.features, poison=options.poison, holds_hinted=options.hints == "hold"
    )
    return driver.negotiate(offered)


@pytest.mark.parametrize(
    ("option", "value", "bit", "wanted"),
    [
        ("hints", "off", F_FREE_PAGE_HINT, False),
        ("hints", "walk", F_FREE_PAGE_HINT, True),
        ("hint_wait_on_ack", True, F_HINT_WAIT_ON_ACK, True),
        ("stats", False, F_STATS_VQ, False),
        ("reporting", True, F_REPORTING, True),
        ("poison", 0, F_PAGE_POISON, True),
        ("sg", False, F_SG, False),
        ("must_tell_host", False, F_MUST_TELL_HOST, False),
        ("deflate_on_oom", False, F_DEFLATE_ON_OOM, False),
    ],
)
def test_every_option_is_a_feature_bit(option: str, value: object, bit: int, wanted: bool) -> None:
    default = BalloonOptions().features
    changed = BalloonOptions.from_dict({option: value}).features
    assert has(changed, bit) == wanted
    assert changed & ~mask(bit) == default & ~mask(bit), "and no other bit"
    assert has(accepted(BalloonOptions.from_dict({option: value})), bit) == wanted


def test_nothing_that_is_not_offered_is_accepted() -> None:
    options = BalloonOptions(reporting=True, poison=0xAAAAAAAA)
    assert accepted(options, mask(F_VERSION_1)) == mask(F_VERSION_1)


def test_a_guest_that_walks_does_not_wait_for_acknowledgements_it_never_needs() -> None:
    assert not has(BalloonOptions(hints="walk", hint_wait_on_ack=True).features, F_HINT_WAIT_ON_ACK)


def test_a_guest_that_poisons_accepts_reporting_only_together_with_poison() -> None:
    options = BalloonOptions(reporting=True, poison=0xAAAAAAAA)
    assert has(accepted(options), F_REPORTING)
    assert not has(accepted(options, EVERYTHING & ~mask(F_PAGE_POISON)), F_REPORTING)
    assert has(accepted(BalloonOptions(reporting=True), EVERYTHING & ~mask(F_PAGE_POISON)), F_REPORTING), (
        "nobody expects a value"
    )


def test_a_guest_that_poisons_hints_what_it_does_not_hold_only_together_with_poison() -> None:
    """A walked block goes on being free: at the destination it would be zero and not the poison."""
    offered = EVERYTHING & ~mask(F_PAGE_POISON)
    assert not has(accepted(BalloonOptions(hints="walk", poison=1), offered), F_FREE_PAGE_HINT)
    assert has(accepted(BalloonOptions(hints="hold", poison=1), offered), F_FREE_PAGE_HINT)
    assert has(accepted(BalloonOptions(hints="walk", poison=1)), F_FREE_PAGE_HINT)


def test_the_poison_is_told_only_when_it_was_negotiated() -> None:
    driver = BalloonDriver(wanted=BalloonOptions(poison=7).features, poison=7)
    driver.negotiate(mask(F_VERSION_1, F_PAGE_POISON))
    assert driver.poison_to_write == 7
    driver.negotiate(mask(F_VERSION_1))
    assert driver.poison_to_write is None


@pytest.mark.parametrize(
    "values",
    [
        {"hint": "hold"},
        {"hints": "both"},
        {"stats": 1},
        {"poison": -1},
        {"poison": 1 << 32},
        {"poison": True},
        {"sg": None},
    ],
)
def test_what_no_driver_knows_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="balloon: "):
        BalloonOptions.from_dict(values)


def test_options_survive_the_journey() -> None:
    options = BalloonOptions(hints="walk", poison=0xAAAAAAAA, reporting=True, sg=False)
    assert BalloonOptions.from_dict(options.to_dict()) == options
