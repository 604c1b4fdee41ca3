"""One crash of the table in containers, chosen by seed: processes are killed inside, the link is a partition."""

import random

import pytest

from testbed.crashes.cell import run_cell
from testbed.crashes.table import CELLS
from testbed.interrupt import Interrupt
from tests.containers.beds import DOCKER
from tests.live.runs import nothing_is_left_of
from tests.live.test_crash_matrix import seed_of_today

pytestmark = [pytest.mark.containers, pytest.mark.usefixtures("image")]


@pytest.mark.parametrize("seed", [seed_of_today()])
def test_a_crash_in_containers_ends_as_the_table_says(tmp_path, seed):
    cell = random.Random(f"{seed}/containers").choice(CELLS)
    done = run_cell(cell, tmp_path, Interrupt(), seed=seed, overrides=DOCKER)
    assert not done.problems, done.line
    nothing_is_left_of(done.run.run_dir)
