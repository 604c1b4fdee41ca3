"""The `ballast` command.

Rule 1: this file parses arguments and prints; everything else is a function of another module, imported when
        its command runs, so that `ballast --help` is quick.
Rule 2: exit codes: 0 valid and as expected; 1 judged invalid, or another outcome than expected; 2 usage or an
        invalid scenario; 3 this machine cannot; 4 verdict unknown.
Rule 3: results go to standard output, everything else to standard error; an error is a line, no traceback.
"""
# ruff: noqa: PLC0415 - rule 1

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed.cli_session import register
from testbed.cli_soak import register as register_soak
from testbed.errors import TestbedError
from testbed.sim.cli import register as register_sim

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

app = typer.Typer(
    name="ballast",
    help="Migrate a guest between two hosts, skip the pages it hints as free, count and prove everything.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("--out", help="Where run directories go.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the scenario's own.")]
HostsKind = Annotated[
    str | None, typer.Option("--hosts", help="local or docker (containers); overrides hosts.kind.")
]
ContextSource = Annotated[
    str | None, typer.Option("--context-source", help="Docker context of the source and of any third host.")
]
ContextDest = Annotated[str | None, typer.Option("--context-dest", help="Docker context of the destination.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in guest.workload.1.fraction=0.5."),
]
ScenarioPath = Annotated[Path, typer.Argument(metavar="SCENARIO.toml", help="See scenarios/.")]
RUNS = Path("runs")


@app.command()
def demo(
    *,
    memory: Annotated[str, typer.Option("--memory", help="Of the guest.")] = "1GiB",
    out: Out = RUNS,
    seed: Seed = None,
    hosts: HostsKind = None,
    context_source: ContextSource = None,
    context_dest: ContextDest = None,
    as_json: Json = False,
) -> None:
    """Migrate a guest four times, skipping nothing, zero pages, hinted pages, both; show what hints saved."""
    with _told():
        from testbed.demo import run_arms, scenarios
        from testbed.interrupt import Interrupt
        from testbed.machine import require
        from testbed.progress import display
        from testbed.tables import demo_table

        arms = scenarios(memory, _unnamed(seed, hosts, context_source, context_dest))
        for scenario in arms.values():
            require(scenario)
        with Interrupt() as interrupt, display() as shown:
            finished = run_arms(arms, out, interrupt, shown)
        results = {arm: run.result for arm, run in finished.items()}
        if as_json:
            _print_json({"arms": {arm: result.to_dict() for arm, result in results.items()}})
        else:
            _print(demo_table(results))
        complete = len(finished) == len(arms)
        _exit([run.exit_code for run in finished.values()] + ([] if complete else [1]))


@app.command()
def run(
    scenario: ScenarioPath,
    *,
    overrides: Overrides = None,
    hosts: HostsKind = None,
    context_source: ContextSource = None,
    context_dest: ContextDest = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run one scenario and judge it."""
    with _told():
        from testbed.interrupt import Interrupt
        from testbed.progress import display
        from testbed.run import run_scenario
        from testbed.scenario_file import load
        from testbed.tables import run_report

        chosen = load(scenario, overrides or (), _unnamed(seed, hosts, context_source, context_dest))
        with Interrupt() as interrupt, display() as shown:
            finished = run_scenario(chosen, out, interrupt, shown.begin(chosen.name))
            shown.finish(chosen.name, finished)
        if as_json:
            _print_json(finished.result.to_dict())
        else:
            _print(run_report(finished.result))
        _exit([finished.exit_code])


@app.command()
def compare(
    scenario: ScenarioPath,
    *,
    vary: Annotated[list[str], typer.Option("--vary", metavar="KEY=A,B,C", help="May be repeated.")],
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=100, help="Runs per variant.")] = 3,
    overrides: Overrides = None,
    hosts: HostsKind = None,
    context_source: ContextSource = None,
    context_dest: ContextDest = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run a scenario in several variants, interleaved, and compare medians."""
    with _told():
        from testbed.compare import run_variants, summarise, variants
        from testbed.interrupt import Interrupt
        from testbed.progress import display
        from testbed.tables import compare_table

        fixed = [*_unnamed(seed, hosts, context_source, context_dest), *(overrides or ())]
        chosen = variants(scenario, vary, fixed)
        with Interrupt() as interrupt, display() as shown:
            finished = run_variants(
                scenario, chosen, fixed, repeat, out=out, interrupt=interrupt, shown=shown
            )
        results = {label: [one.result for one in runs] for label, runs in finished.items()}
        summaries = {label: summarise(several) for label, several in results.items() if several}
        if as_json:
            _print_json({
                "schema": 1,
                "scenario": str(scenario),
                "variants": {
                    label: {
                        "overrides": chosen[label],
                        "summary": summary.to_dict(),
                        "runs": [result.to_dict() for result in results[label]],
                    }
                    for label, summary in summaries.items()
                },
            })  # fmt: skip
        else:
            _print(compare_table(summaries))
        complete = all(len(runs) == repeat for runs in finished.values())
        _exit([one.exit_code for runs in finished.values() for one in runs] + ([] if complete else [1]))


@app.command()
def dirtyrate(
    scenario: Annotated[
        Path | None, typer.Argument(metavar="SCENARIO.toml", help="See scenarios/; or --session.")
    ] = None,
    *,
    session_dir: Annotated[
        Path | None,
        typer.Option("--session", metavar="DIR", help="Of a standing session, instead of a scenario."),
    ] = None,
    period: Annotated[str, typer.Option("--period", help="Of one sample.")] = "250ms",
    periods: Annotated[int, typer.Option("--periods", min=1, help="How many samples.")] = 8,
    rate: Annotated[
        str, typer.Option("--rate", help="What the link carries, where migration.bandwidth is no limit.")
    ] = "",
    overrides: Overrides = None,
    hosts: Annotated[str | None, typer.Option("--hosts", help="Overrides hosts.kind.")] = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a guest dirties memory, and predict its migration for each arm."""
    with _told():
        from testbed.dirty_rate import dirty_rate_report, measured_rate

        measured = measured_rate(
            scenario, session_dir, _unnamed(seed, hosts), overrides or (),
            out=out, period=period, periods=periods, rate=rate,
        )  # fmt: skip
        if as_json:
            _print_json(measured.to_dict())
        else:
            _print(dirty_rate_report(measured))


@app.command()
def check(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A directory under runs/.")],
    as_json: Json = False,
) -> None:
    """Judge a recorded run again, from its directory alone."""
    with _told():
        from testbed.checkers import judge
        from testbed.record import load
        from testbed.result import build
        from testbed.tables import findings_table

        record = load(run_dir)
        judgement = judge(record)
        if as_json:
            _print_json({**judgement.to_dict(), "result": build(record, judgement).to_dict()})
        else:
            _print(findings_table(judgement))
        _exit([judgement.exit_code])


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do, and what it lacks for which feature."""
    with _told():
        from testbed.doctor import examine, fit, to_dict
        from testbed.tables import doctor_table

        checkups = examine()
        if as_json:
            _print_json(to_dict(checkups))
        else:
            _print(doctor_table(checkups))
        _exit([0 if fit(checkups) else 3])


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what crashed runs left behind: processes, containers, networks, directories that carry our label."""
    with _told():
        from testbed.clean import look, remove

        found, problems = look()
        for problem in problems:
            typer.echo(f"ballast: {problem}", err=True)
        removed = [str(left) for left in found if dry_run or remove(left)]
        if as_json:
            _print_json({"schema": 1, "dry_run": dry_run, "removed": removed})
            return
        for line in removed:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {line}")
        if not removed:
            typer.echo("nothing was left behind")


def main() -> None:
    """The console script."""
    app()


register(app)
register_sim(app)
register_soak(app)


@contextmanager
def _told() -> Iterator[None]:
    """Turns this package's errors into lines and an exit code."""
    try:
        yield
    except TestbedError as error:
        for problem in error.problems:
            typer.echo(f"ballast: {problem}", err=True)
        raise typer.Exit(error.exit_code) from None


def _exit(codes: Iterable[int]) -> None:
    """The gravest of the codes: invalid before unknown before fine."""
    gravest = max(codes, key=(0, 4, 1, 2, 3).index, default=0)
    if gravest:
        raise typer.Exit(gravest)


def _unnamed(
    seed: int | None,
    hosts: str | None = None,
    context_source: str | None = None,
    context_dest: str | None = None,
) -> list[str]:
    """Options that stand for overrides and do not appear in the scenario's name."""
    chosen = {
        "seed": seed,
        "hosts.kind": hosts,
        "hosts.context_source": context_source,
        "hosts.context_dest": context_dest,
    }
    return [f"{key}={value}" for key, value in chosen.items() if value is not None]


def _print(renderable: RenderableType) -> None:
    from rich.console import Console

    # Where nobody set a width (a pipe, a log) the tables get as much room as they need.
    chosen = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if chosen else 120).print(renderable)


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
