"""The model of pre-copy against the formulas it is made of, and against guests worked out by hand."""

from __future__ import annotations

import math

import pytest

from migration.errors import LocalProtocolError
from migration.events import Skip
from migration.model import (
    Conditions,
    Costs,
    DirtyCurve,
    FirstRound,
    GuestPages,
    predict,
    predict_from_round_1,
)
from migration.pages import PAGE_BYTES
from migration.rounds import Limits, ThrottleSteps

FREE = Costs(setup_ms=0, round_ms=0, switch_ms=0)
PAGES = 100_000
RATE = 100e6  # bytes a second
PAGES_PER_S = RATE / PAGE_BYTES


def conditions(asked, costs=FREE):
    return Conditions(RATE, asked, costs)


def guest(**parts):
    return GuestPages(**{"pages": PAGES, "populated": PAGES, "free": 0, **parts})


def limits(downtime_limit_ms=1.0, **parts):
    return Limits(downtime_limit_ms=downtime_limit_ms, timeout_ms=math.inf, **parts)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_without_a_working_set_the_rounds_are_the_geometric_series(share):
    """V_i = V lambda^i; V_total = V (1 - lambda^(n+1)) / (1 - lambda); downtime = V lambda^n / bandwidth."""
    curve = DirtyCurve.capped(share * PAGES_PER_S, 1e12)
    found = predict(guest(), Skip.NONE, curve, conditions(limits(rounds_max=1000)))
    n = found.rounds - 1
    assert found.converges
    assert found.round_pages == tuple(round(PAGES * share**i) for i in range(n + 1))
    total = PAGES * (1 - share ** (n + 1)) / (1 - share)
    assert found.payload_bytes == pytest.approx(total * PAGE_BYTES, abs=n * PAGE_BYTES)
    assert found.total_ms == pytest.approx(total / PAGES_PER_S * 1e3)
    assert found.downtime_ms == pytest.approx(PAGES * share**n / PAGES_PER_S * 1e3)
    assert found.downtime_ms <= 1.0 < PAGES * share ** (n - 1) / PAGES_PER_S * 1e3


def test_a_working_set_caps_what_a_round_dirties():
    """V_i = min(D T_(i-1), W): twice as fast as the link, but only 5000 pages of it."""
    curve = DirtyCurve.capped(2 * PAGES_PER_S, 5000)
    found = predict(guest(), Skip.NONE, curve, conditions(limits(250.0)))
    assert found.round_pages == (PAGES, 5000)
    assert found.converges
    assert found.downtime_ms == pytest.approx(5000 * PAGE_BYTES / RATE * 1e3)


@pytest.mark.parametrize(("on_rounds_max", "outcome"), [("switch", "completed"), ("cancel", "cancelled")])
def test_what_does_not_converge_is_said_and_the_limits_decide(on_rounds_max, outcome):
    curve = DirtyCurve.capped(1.5 * PAGES_PER_S, 50_000)
    asked = limits(100.0, rounds_max=4, on_rounds_max=on_rounds_max)
    found = predict(guest(), Skip.NONE, curve, conditions(asked))
    assert not found.converges
    assert found.outcome == outcome
    assert found.reason.startswith("does not converge")
    assert found.round_pages[:4] == (PAGES, 50_000, 50_000, 50_000)
    assert found.rounds == (5 if outcome == "completed" else 4)
    assert found.downtime_ms == pytest.approx(50_000 * PAGE_BYTES / RATE * 1e3)


def test_a_timeout_ends_it_too():
    curve = DirtyCurve.capped(1.5 * PAGES_PER_S, 50_000)
    asked = Limits(downtime_limit_ms=1.0, timeout_ms=5000.0, rounds_max=1000)
    found = predict(guest(), Skip.NONE, curve, conditions(asked))
    assert (found.outcome, found.converges) == ("cancelled", False)
    assert 5000 <= found.total_ms < 5000 + 50_000 / PAGES_PER_S * 1e3 + 1


def test_throttling_makes_a_guest_converge():
    curve = DirtyCurve.capped(1.2 * PAGES_PER_S, 1e9)
    steps = ThrottleSteps(start_percent=20, increment_percent=20, maximum_percent=80)
    asked = limits(50.0, rounds_max=300, on_stall="throttle", throttle=steps)
    assert predict(guest(), Skip.NONE, curve, conditions(asked)).converges
    assert not predict(guest(), Skip.NONE, curve, conditions(limits(50.0, rounds_max=300))).converges


def test_what_each_arm_carries_in_round_1():
    """100 pages: 10 ballooned, 20 never touched and free, 40 freed and resident, 5 of the rest zero."""
    mixed = GuestPages(pages=100, populated=70, free=60, ballooned=10, zero_populated=5)
    assert [mixed.first_round_pages(skip) for skip in Skip] == [90, 65, 30, 25]
    late = GuestPages(pages=100, populated=70, free=60, ballooned=10, zero_populated=5, hinted_share=0.5)
    assert [late.first_round_pages(skip) for skip in Skip] == [90, 65, 60, 45]
    measured = GuestPages(pages=100, populated=90, free=60, ballooned=10, free_populated=60)
    assert [measured.first_round_pages(skip) for skip in Skip] == [90, 90, 30, 30]


def test_hints_shorten_every_round_until_the_working_set_caps_it():
    """V_total' = (1 - f) V_total (FACTS section 7)."""
    curve = DirtyCurve.capped(0.5 * PAGES_PER_S, 1e12)
    unhinted = predict(guest(), Skip.NONE, curve, conditions(limits(0.01, rounds_max=14)))
    hinted = predict(guest(free=80_000), Skip.HINT, curve, conditions(limits(0.01, rounds_max=14)))
    assert hinted.payload_bytes == pytest.approx(0.2 * unhinted.payload_bytes, rel=0.01)


def test_pages_freed_between_rounds_are_not_carried_with_hints():
    curve = DirtyCurve.capped(2 * PAGES_PER_S, 40_000)
    churning = guest(freed_share=0.75)
    unhinted = predict(churning, Skip.ZERO, curve, conditions(limits(10.0, rounds_max=3)))
    hinted = predict(churning, Skip.BOTH, curve, conditions(limits(10.0, rounds_max=3)))
    assert unhinted.round_pages[1] == 40_000
    assert hinted.round_pages[1] == 10_000


def test_an_idle_guest_has_two_rounds():
    found = predict(guest(), Skip.NONE, DirtyCurve.capped(0, 0), conditions(limits(), Costs(10, 5, 20)))
    assert found.round_pages == (PAGES, 0)
    assert found.total_ms == pytest.approx(10 + PAGES * PAGE_BYTES / RATE * 1e3 + 5 + 20)
    assert found.downtime_ms == 20


def test_a_configured_bandwidth_caps_the_rate():
    curve = DirtyCurve.capped(0, 0)
    slow = predict(guest(), Skip.NONE, curve, conditions(limits(bandwidth=RATE / 10)))
    assert slow.total_ms == pytest.approx(PAGES * PAGE_BYTES / RATE * 1e4)


def test_a_measured_curve_is_followed_and_goes_on_as_steep_as_it_ended():
    curve = DirtyCurve((0.25, 0.5, 1.0), (1000, 1500, 1600), pages_max=2000)
    assert [curve.pages(t) for t in (0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 100)] == [
        0, 500, 1000, 1500, 1550, 1600, 1700, 2000
    ]  # fmt: skip


def test_a_curve_that_falls_is_refused():
    with pytest.raises(LocalProtocolError):
        DirtyCurve((0.25, 0.5), (1000, 900), pages_max=2000)


def test_the_rest_of_a_migration_from_its_first_round():
    first = FirstRound(payload_pages=50_000, dirtied_pages=10_000, duration_ms=2048.0, elapsed_ms=2060.0)
    found = predict_from_round_1(first, PAGES, conditions(limits(50.0), Costs(0, 0, 20)))
    assert found.round_pages == (50_000, 10_000, 2000, 400)
    assert found.rounds == 4
    assert found.downtime_ms == pytest.approx(400 / PAGES_PER_S * 1e3 + 20)
    assert found.total_ms == pytest.approx(2060 + 12_400 / PAGES_PER_S * 1e3 + 20)
