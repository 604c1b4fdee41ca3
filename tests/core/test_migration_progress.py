"""What is told while a migration is under way: only what can be known by then."""

from __future__ import annotations

import pytest

from migration.model import Conditions, Costs, DirtyCurve
from migration.pages import PAGE_BYTES
from migration.progress import Standing, outlook
from migration.rounds import Limits
from testbed.run.progress import _outlook

RATE = 1000 * PAGE_BYTES  # 1000 pages a second
CONDITIONS = Conditions(RATE, Limits(downtime_limit_ms=100, timeout_ms=1e9), Costs(0, 0, 20))


def standing(**parts):
    return Standing(**{
        "samples": (), "round_index": 1, "remaining_pages": 500, "round_ms": 100.0, "elapsed_ms": 120.0,
        "pages": 10_000, "paused": False, **parts,
    })  # fmt: skip


def test_in_round_1_nobody_knows_how_the_guest_writes():
    found = outlook(standing(), CONDITIONS)
    assert (found.dirty_pages_per_s, found.expected_downtime_ms, found.expected_rounds) == (None, None, None)
    assert found.remaining_bytes == 500 * PAGE_BYTES
    assert found.eta_ms == pytest.approx(520)  # at least


def test_later_the_model_follows_the_rounds_that_ended():
    """2 s dirtied 1000 pages. 400 of 500 ms of round 2 are left: 250 dirty, 125 after round 3, 62 after round 4."""
    found = outlook(
        standing(samples=[(2.0, 1000)], round_index=2, remaining_pages=400, round_ms=100.0), CONDITIONS
    )
    assert found.dirty_pages_per_s == 500
    assert found.expected_rounds == 5
    assert found.expected_downtime_ms == pytest.approx(62.5 + 20)
    assert found.eta_ms == pytest.approx(400 + 250 + 125 + 62.5 + 20)


def test_with_the_guest_paused_what_remains_is_all_there_is():
    found = outlook(
        standing(samples=[(2.0, 1000)], round_index=3, remaining_pages=50, paused=True), CONDITIONS
    )
    assert found.eta_ms == pytest.approx(70)
    assert found.expected_downtime_ms is None


def test_a_curve_of_samples_rises_whatever_the_rounds_found():
    curve = DirtyCurve.of_samples([(2.0, 1000), (0.5, 800), (0.1, 900), (0.5, 850), (0.0, 3)], 5000)
    assert [round(curve.pages(t)) for t in (0.1, 0.5, 2.0)] == [900, 900, 1000]
    assert DirtyCurve.of_samples([], 5000).pages(10) == 0


def test_the_line_for_people_says_what_is_known():
    first = {"remaining_pages": 256, **outlook(standing(remaining_pages=256), CONDITIONS).fields()}
    assert list(_outlook(1 << 20, first).values()) == [
        "1.00 MiB/s",
        "1.00 MiB left",
        "over in at least 276 ms",
    ]
    later = outlook(standing(samples=[(2.0, 1024)], round_index=2, remaining_pages=256), CONDITIONS)
    line = ", ".join(_outlook(1 << 20, {"remaining_pages": 256, **later.fields()}).values())
    assert line.startswith("1.00 MiB/s, 1.00 MiB left, dirties 2.00 MiB/s, downtime about ")
    assert "over in about" in line
