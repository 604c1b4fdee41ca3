"""Crashes at protocol points, for real: a sample of the table's cells (testbed/crashes/table.py), chosen by seed.

The whole matrix is `ballast soak --matrix`. BALLAST_SEED repeats a sample; without it the sample changes from day
to day, so that in time every cell is seen. A person waits for every crash once, CI (CI=true) for each twice.
"""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from testbed.crashes.cell import run_cell
from testbed.crashes.table import CELLS, CRASHES
from testbed.interrupt import Interrupt
from tests.live.runs import memory_held, nothing_is_left_of

SAMPLE = len(CRASHES) * (2 if os.environ.get("CI") else 1)
AT_ONCE = 2  # a cell mostly waits for processes to start


def seed_of_today():
    told = os.environ.get("BALLAST_SEED")
    return int(told) if told else datetime.now(tz=UTC).date().toordinal()


def sample(seed, count=SAMPLE):
    """Different points, every crash about as often."""
    dice = random.Random(f"{seed}/crashes")
    points = dice.sample(sorted({cell.point for cell in CELLS}), count)
    crashes = (list(CRASHES) * count)[:count]
    dice.shuffle(crashes)
    return [cell for cell in CELLS if (cell.point, cell.crash) in set(zip(points, crashes, strict=True))]


@pytest.mark.live
@pytest.mark.parametrize("seed", [seed_of_today()])
def test_a_sample_of_crashes_ends_as_the_table_says(tmp_path, seed):
    cells, others = sample(seed), memory_held()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = list(pool.map(lambda cell: run_cell(cell, tmp_path, Interrupt(), seed=seed), cells))
    assert not [one.line for one in runs if one.problems], f"repeat with BALLAST_SEED={seed}"
    for one in runs:
        nothing_is_left_of(one.run.run_dir, others)
        healed = [event for event in (one.run.result.faults) if event.healed_at_ms is not None]
        assert [fault.at for fault in healed] == [one.cell.point], "its crash is in the result"


def test_a_sample_is_the_seeds_and_has_every_crash():
    assert sample(7) == sample(7) != sample(8)
    assert len(sample(7)) == SAMPLE
    assert {cell.crash for cell in sample(7)} == set(CRASHES)
