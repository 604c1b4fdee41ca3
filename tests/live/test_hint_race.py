"""Hazard 1 as a real run: hinted pages are taken back and written before the device has looked at the hint.

What they prove: under one exact schedule the unsafe rule loses exactly the pages that were taken back, both proofs
say so, and the safe rule loses nothing: those pages, and no others of the skipped ones, are sent in the next round.
"""

from pathlib import Path

import pytest

from testbed.checkers import judge
from testbed.interrupt import Interrupt
from testbed.record.run_record import load as load_record
from testbed.run.runner import FinishedRun, run_scenario
from testbed.scenario.file import load

pytestmark = pytest.mark.live

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
RETAKEN = 64
QUICK = ["guest.memory=128MiB", "run.settle=100ms", "run.run_on=100ms"]


def run(name: str, out: Path, *overrides: str) -> FinishedRun:
    scenario = load(SCENARIOS / f"{name}.toml", overrides, QUICK)
    with Interrupt() as interrupt:
        return run_scenario(scenario, out, interrupt, lambda _: None)


@pytest.mark.parametrize("driver", ["walk", "hold"])
def test_the_unsafe_rule_loses_what_was_taken_back_and_is_caught(tmp_path: Path, driver: str) -> None:
    finished = run("hazard-hint-race-unsafe", tmp_path, f"balloon.hints={driver}")
    result = finished.result
    assert (result.outcome, result.verdict) == ("completed", "invalid"), "never anything but invalid"
    assert finished.exit_code == 0, "and it is what the scenario expects"
    assert result.engine["hint_rule"] == "unsafe_clear_dirty_log_at_hint"
    assert result.integrity.mismatches == RETAKEN
    assert result.hints.redirtied_pages == 0, "the dirty log was cleared: the next round knew of none"
    assert any(reason.startswith("memory: ") for reason in result.reasons)
    assert any(reason.startswith("oracle: retake") and "64 items" in reason for reason in result.reasons)
    assert judge(load_record(finished.run_dir.path)).exit_code == 0, "judged again, the same"


@pytest.mark.parametrize("driver", ["walk", "hold"])
def test_the_safe_rule_survives_the_same_schedule(tmp_path: Path, driver: str) -> None:
    finished = run("hazard-hint-race", tmp_path, f"balloon.hints={driver}")
    result = finished.result
    assert (result.outcome, result.verdict, result.reasons) == ("completed", "valid", [])
    assert result.engine["hint_rule"] == "safe"
    assert result.balloon.hints_driver == driver
    assert result.hints.redirtied_pages == RETAKEN, "hinted, skipped, and in the next harvest"
    assert result.integrity.skipped_pages_proved_free == result.hints.skipped_pages - RETAKEN
    assert result.integrity.mismatches == 0


def test_a_driver_that_waits_for_acknowledgements_cannot_race(tmp_path: Path) -> None:
    """HINT_WAIT_ON_ACK: even the unsafe rule loses nothing, as no hinted page is had before the device saw it."""
    overrides = ["balloon.hints=hold", "balloon.hint_wait_on_ack=true"]
    finished = run("hazard-hint-race-unsafe", tmp_path, *overrides)
    assert "hint_wait_on_ack" in finished.result.balloon.features
    assert finished.result.outcome == "completed"
    assert finished.result.hints.skipped_pages > 0
    assert finished.result.integrity.mismatches == 0
    assert finished.result.reasons == ["expectation: expected lost writes to be found, and none were"]
    assert finished.exit_code == 1
