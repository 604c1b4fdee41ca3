"""One run from scenario to verdict.

Rule 1: what this machine cannot do is refused before anything is started.
Rule 2: everything that a run starts is undone when it ends, however it ends; then its directory is judged.
Rule 3: a run that broke is a result like any other: outcome "failed", with the reason.
"""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.checkers import Judgement, judge
from testbed.errors import InterruptedRunError, RunBrokenError, TestbedError
from testbed.history import History
from testbed.hosts.opening import open_hosts
from testbed.hosts.runtime_dir import RuntimeDir
from testbed.machine import capabilities
from testbed.record.run_dir import RunDir, create, write_json, write_lines
from testbed.record.run_record import load
from testbed.report.result import Result, build
from testbed.run.fault_schedule import Schedule
from testbed.run.meters import outside_witness
from testbed.run.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from testbed.history import Event
    from testbed.interrupt import Interrupt
    from testbed.scenario.document import Scenario


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that ended and was judged."""

    run_dir: RunDir
    result: Result
    judgement: Judgement

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return self.judgement.exit_code


def run_scenario(
    scenario: Scenario, out: Path, interrupt: Interrupt, watch: Callable[[Event], None]
) -> FinishedRun:
    """Runs and judges a scenario. `watch` is told every event, on whatever thread it arrives.

    Raises:
        MachineCannotError, UsageError: nothing was started.
    """
    run_dir, _ = record_run(scenario, out, interrupt, watch, Session.run)
    return conclude(run_dir)


def record_run(
    scenario: Scenario,
    out: Path,
    interrupt: Interrupt,
    watch: Callable[[Event], None],
    drive: Callable[[Session], None],
) -> tuple[RunDir, TestbedError | None]:
    """Starts the scenario's hosts, has `drive` do something with them, and undoes everything.

    Returns:
        the run's directory with its history, and what broke off the drive (also in the history), if anything.

    Raises:
        MachineCannotError, UsageError: nothing was started.
    """
    capabilities.require(scenario)
    run_id = secrets.token_hex(4)
    run_dir = create(out, scenario.name, scenario.seed)
    write_json(
        run_dir.manifest,
        {
            "schema": 1,
            "run": run_id,
            "started_utc": run_dir.path.name.split("-")[0],
            "scenario": scenario.model_dump(mode="json"),
            "machine": capabilities.facts(),
        },
    )
    with ExitStack() as stack:
        history = History(run_dir.events)
        stack.callback(history.close)
        history.subscribe(watch)

        def pressed() -> None:
            history.note("interrupted", hurry=interrupt.hurried)

        interrupt.listen(pressed)
        stack.callback(interrupt.ignore, pressed)
        broken = _drive(scenario, run_id, run_dir=run_dir, interrupt=interrupt, history=history, drive=drive)
        history.note("run_ended")
    return run_dir, broken


def conclude(run_dir: RunDir) -> FinishedRun:
    """Judges a recorded run and writes its result beside the record."""
    record = load(run_dir.path)
    judgement = judge(record)
    result = build(record, judgement)
    write_lines(run_dir.rounds, [part.model_dump() for part in result.rounds])
    write_json(run_dir.verdict, judgement.to_dict())
    write_json(run_dir.result, result.to_dict())
    return FinishedRun(run_dir, result, judgement)


def _drive(
    scenario: Scenario,
    run_id: str,
    *,
    run_dir: RunDir,
    interrupt: Interrupt,
    history: History,
    drive: Callable[[Session], None],
) -> TestbedError | None:
    runtime = RuntimeDir(run_id)
    try:
        history.note("run_started", run=run_id, scenario=scenario.name, seed=scenario.seed)
        with (
            open_hosts(
                scenario, run_id, run_dir=run_dir, runtime=runtime, history=history, interrupt=interrupt
            ) as hosts,
            outside_witness(hosts, history),
            Schedule(scenario, run_id, hosts=hosts, history=history),
        ):
            drive(
                Session(
                    scenario,
                    migration=f"{scenario.name}-{run_id}",
                    hosts=hosts,
                    run_dir=run_dir,
                    history=history,
                    interrupt=interrupt,
                )
            )
    except RunBrokenError as error:
        history.note("run_broken", reason=str(error))
        return error
    except InterruptedRunError as error:
        history.note("run_cut_short", reason=str(error))
        return error
    finally:
        runtime.remove()
    return None
