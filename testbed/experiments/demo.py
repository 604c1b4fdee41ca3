"""The main job, four times: nothing skipped, zero pages skipped, hinted pages skipped, both.

Rule 1: the arms differ in `migration.skip` and in nothing else; same guest, same seed.
Rule 2: the demo is an ordinary scenario (demo.toml beside this file) and each arm an ordinary run.
Rule 3: Ctrl-C ends the arm under way in order and no further one begins.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.errors import UsageError
from testbed.run.runner import FinishedRun, run_scenario
from testbed.scenario.file import parse
from testbed.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.interrupt import Interrupt
    from testbed.run.progress import Display
    from testbed.scenario.document import Scenario

ARMS: Final = ("none", "zero", "hint", "both")
DEMO: Final = Path(__file__).with_name("demo.toml")
# In a small guest the page cache would crowd out what the demo is about: at most an eighth of memory.
FILES_BYTES_MAX: Final = 64 << 20
FILES_PART: Final = 8


def scenarios(memory: str, unnamed: Sequence[str] = ()) -> dict[str, Scenario]:
    """The four arms for a guest of this size, with more overrides. Raises UsageError where one is not possible."""
    try:
        memory_bytes = parse_bytes(memory)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from error
    files_bytes = min(FILES_BYTES_MAX, memory_bytes // FILES_PART)
    sizes = [f"guest.memory={memory_bytes}", f"guest.workload.0.bytes_max={files_bytes}"]
    text = DEMO.read_text(encoding="utf-8")
    return {
        arm: parse(
            text, default_name=DEMO.stem, overrides=[f"migration.skip={arm}"], unnamed=[*sizes, *unnamed]
        )
        for arm in ARMS
    }


def run_arms(
    arms: dict[str, Scenario], out: Path, interrupt: Interrupt, shown: Display
) -> dict[str, FinishedRun]:
    """Runs them one after the other."""
    finished: dict[str, FinishedRun] = {}
    for arm, scenario in arms.items():
        if interrupt.pressed:
            break
        finished[arm] = run_scenario(scenario, out, interrupt, shown.begin(arm))
        shown.finish(arm, finished[arm])
    return finished
