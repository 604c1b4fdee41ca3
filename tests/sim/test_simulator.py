"""The simulator: nothing breaks where nothing is planted, everything planted is found, and a seed is a seed."""

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.sim import coverage
from testbed.sim.minimise import minimised
from testbed.sim.options import draw
from testbed.sim.plants import DESCRIPTIONS, Plant
from testbed.sim.runner import run_seeds
from testbed.sim.simulation import simulate

SEEDS = 120
PLANT_SEEDS = 2_000  # each planted bug is found within these; the first find ends the search


def test_no_invariant_breaks():
    summary = run_seeds(0, SEEDS, Plant.NONE, lambda _done, _violations: None)
    again = [f"ballast sim --seed {outcome.seed}: {outcome.violation}" for outcome in summary.failing]
    assert not again
    assert summary.seeds == SEEDS
    document = summary.to_dict()
    assert document["steps_median"] >= 300, "the standard world is long enough to be worth it"
    assert all(draw(seed).pages >= 256 for seed in range(SEEDS))
    json.dumps(document)


# Where it was found last: looked at first, so that this is quick. When the dice change, the search begins at 0.
FOUND_LAST = {
    Plant.DIRTY_LOG_CLEARED_AT_HINT: 6,
    Plant.HARVEST_WHILE_ID_OPEN: 83,
    Plant.DIRTY_BIT_CLEARED_AFTER_READ: 3,
    Plant.RESUME_AFTER_COMMITTING: 2,
    Plant.COMMIT_NOT_DURABLE: 3,
    Plant.DONE_FORGOTTEN_ON_CANCEL: 0,
    Plant.RETRY_WITHOUT_ZEROING: 8,
    Plant.STALE_ID_ACCEPTED: 640,
    Plant.ACKNOWLEDGED_FORGOTTEN_ON_RECONNECT: 21,
    Plant.PREPARE_REPLAYED_AFTER_RESUME: 1237,
    Plant.LATE_CHUNK_STORED: 393,
    Plant.TWO_PROCESSES_ONE_JOURNAL: 162,
    Plant.DEVICE_STORES_NOT_LOGGED: 37,
    Plant.BALLOON_LOOKED_UP_TOO_EARLY: 52,
    Plant.BALLOONED_THOUGH_WRITTEN: 95,
    Plant.BALLOON_MASK_STALE: 25,
    Plant.BALLOON_DROPPED_AT_HANDOVER: 7,
    Plant.BALLOON_NOT_GIVEN_BACK: 4,
    Plant.PUNCHED_PAGES_NOT_LOGGED: 14,
    Plant.CHAIN_BACK_BEFORE_PUNCH: 8,
}


@pytest.mark.parametrize("plant", DESCRIPTIONS, ids=lambda plant: plant.value)
def test_a_planted_bug_is_found(plant):
    for seed in (FOUND_LAST[plant], *range(PLANT_SEEDS)):
        outcome = simulate(seed, plant)
        if outcome.violation:
            return
    raise AssertionError(f"{plant.value} was not found in {PLANT_SEEDS} seeds")


def test_a_seed_is_the_same_world_every_time():
    first, second = (simulate(11, transcript=True) for _ in range(2))
    assert first.transcript == second.transcript
    assert (first.steps, first.coverage) == (second.steps, second.coverage)
    assert simulate(11).steps == first.steps, "a transcript changes nothing"


def test_a_failure_is_made_small_and_fails_alike():
    failing = next(
        outcome
        for outcome in (simulate(seed, Plant.DONE_FORGOTTEN_ON_CANCEL) for seed in range(200))
        if outcome.violation and len(outcome.options.faults) > 1
    )
    smallest = minimised(failing, Plant.DONE_FORGOTTEN_ON_CANCEL)
    assert len(smallest.options.faults) < len(failing.options.faults)
    assert smallest.violation.partition(":")[0] == failing.violation.partition(":")[0]
    assert "VIOLATION" in smallest.transcript[-1]


def test_the_universe_of_coverage_is_made_from_the_tables():
    groups = coverage.universe()
    assert "COMMITTING CommitAnswered COMPLETING" in groups["source_transitions"]
    assert "PREPARED CommitRequested CONFIRMING" in groups["dest_transitions"]
    assert "source.COMMITTING.written" in groups["points"]
    counted = coverage.grouped(Counter({"outcome completed": 3}))
    assert counted["outcomes"] == {"completed": 3, "rehearsal": 0, "cancelled": 0, "failed": 0}
    assert "outcomes: failed" in coverage.unreached(counted)


def test_the_command_replays_a_seed_and_names_what_can_be_planted():
    runner = CliRunner()
    listed = runner.invoke(app, ["sim", "--plant", "list"])
    assert listed.exit_code == 0
    assert "commit-not-durable" in listed.output
    mistyped = runner.invoke(app, ["sim", "--plant", "comit-not-durable"])
    assert mistyped.exit_code == 2
    assert mistyped.stderr == (
        "ballast: there is no bug 'comit-not-durable' to plant: `ballast sim --plant list` names them; "
        "did you mean 'commit-not-durable'?\n"
    )
    replayed = runner.invoke(app, ["sim", "--seed", "3"])
    assert replayed.exit_code == 0, replayed.output
    assert "every invariant holds" in replayed.output
    asked = runner.invoke(app, ["sim", "--seeds", "3", "--processes", "1", "--json"])
    document = json.loads(asked.stdout)
    assert json.loads(asked.stderr.splitlines()[-1])["seeds_done"] == 3
    assert {"seeds", "violations", "seconds", "steps", "coverage"} <= document.keys()
    assert (document["seeds"], document["violations"]) == (3, [])
    failing = runner.invoke(
        app,
        ["sim", "--seeds", "300", "--processes", "1", "--plant", "dirty-bit-cleared-after-read", "--json"],
    )
    assert failing.exit_code == 0, "it was found"
    (violation,) = json.loads(failing.stdout)["violations"]
    assert violation["violation"].startswith("no lost write")
    assert violation["transcript"]
