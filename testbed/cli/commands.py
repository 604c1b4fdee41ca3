"""The `ballast` command.

Rule 1: this file parses arguments and prints; everything else is a function of another module, imported when
        its command runs, so that `ballast --help` is quick.
Rule 2: exit codes: 0 valid and as expected; 1 judged invalid, or another outcome than expected; 2 usage or an
        invalid scenario; 3 this machine cannot; 4 verdict unknown.
Rule 3: results go to standard output, everything else to standard error; an error is a line, no traceback.
"""
# ruff: noqa: PLC0415 - rule 1

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from testbed.cli.options import (
    RUNS,
    ContextDest,
    ContextSource,
    HostsKind,
    Json,
    Out,
    Overrides,
    ScenarioPath,
    Seed,
    unnamed,
)
from testbed.cli.output import leave_with, print_json, print_table, told
from testbed.cli.session_commands import register
from testbed.cli.sim_command import register as register_sim
from testbed.cli.soak_command import register as register_soak

REPEATS_MAX: Final = 100  # a slip must not start a day of runs


class Commands(TyperGroup):
    """The commands in the order in which --help lists them: `fault` is a group, and stands beside `migrate`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """As they were registered, but for `fault`, since groups come after all commands."""
        names = [name for name in super().list_commands(ctx) if name != "fault"]
        names.insert(names.index("migrate") + 1, "fault")
        return names


def show_version(wanted: bool) -> None:
    """What the installed package says it is."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ballast {version('ballast')}")
        raise typer.Exit


app = typer.Typer(
    name="ballast",
    cls=Commands,
    help="Migrate a guest between two hosts, skip the pages it hints as free, count and prove everything.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def ballast(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=show_version),
    ] = False,
) -> None:
    """Options of the command itself."""


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
    """Migrate a guest four times and show what its hints saved.

    Skipped are: nothing, zero pages, hinted pages, both. Every migration is judged.
    """
    with told():
        from testbed.experiments.demo import run_arms, scenarios
        from testbed.interrupt import Interrupt
        from testbed.machine.capabilities import require
        from testbed.report.tables import demo_table
        from testbed.run.progress import display

        arms = scenarios(memory, unnamed(seed, hosts, context_source, context_dest))
        for scenario in arms.values():
            require(scenario)
        with Interrupt() as interrupt, display() as shown:
            finished = run_arms(arms, out, interrupt, shown)
        results = {arm: run.result for arm, run in finished.items()}
        if as_json:
            print_json({"arms": {arm: result.to_dict() for arm, result in results.items()}})
        else:
            print_table(demo_table(results))
        complete = len(finished) == len(arms)
        leave_with([run.exit_code for run in finished.values()] + ([] if complete else [1]))


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
    with told():
        from testbed.interrupt import Interrupt
        from testbed.report.tables import run_report
        from testbed.run.progress import display
        from testbed.run.runner import run_scenario
        from testbed.scenario.file import load

        chosen = load(scenario, overrides or (), unnamed(seed, hosts, context_source, context_dest))
        with Interrupt() as interrupt, display() as shown:
            finished = run_scenario(chosen, out, interrupt, shown.begin(chosen.name))
            shown.finish(chosen.name, finished)
        if as_json:
            print_json(finished.result.to_dict())
        else:
            print_table(run_report(finished.result))
        leave_with([finished.exit_code])


@app.command()
def compare(
    scenario: ScenarioPath,
    *,
    vary: Annotated[list[str], typer.Option("--vary", metavar="KEY=A,B,C", help="May be repeated.")],
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=REPEATS_MAX, help="Runs per variant.")] = 3,
    overrides: Overrides = None,
    hosts: HostsKind = None,
    context_source: ContextSource = None,
    context_dest: ContextDest = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Run variants of a scenario, interleaved, and compare medians."""
    with told():
        from testbed.experiments.compare import run_variants, variants
        from testbed.interrupt import Interrupt
        from testbed.report.comparison import summarise
        from testbed.report.tables import compare_table
        from testbed.run.progress import display

        fixed = [*unnamed(seed, hosts, context_source, context_dest), *(overrides or ())]
        chosen = variants(scenario, vary, fixed)
        with Interrupt() as interrupt, display() as shown:
            finished = run_variants(
                scenario, chosen, fixed, repeat, out=out, interrupt=interrupt, shown=shown
            )
        results = {label: [one.result for one in runs] for label, runs in finished.items()}
        summaries = {label: summarise(several) for label, several in results.items() if several}
        if as_json:
            print_json({
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
            print_table(compare_table(summaries))
        complete = all(len(runs) == repeat for runs in finished.values())
        leave_with([one.exit_code for runs in finished.values() for one in runs] + ([] if complete else [1]))


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
    period: Annotated[
        str, typer.Option("--period", help="Of one sample, as in 250ms or 2s; a bare number is ms.")
    ] = "250ms",
    periods: Annotated[int, typer.Option("--periods", min=1, help="How many samples.")] = 8,
    rate: Annotated[
        str,
        typer.Option(
            "--rate", help="What the link carries, as in 1Gbit/s, where migration.bandwidth is no limit."
        ),
    ] = "",
    overrides: Overrides = None,
    hosts: Annotated[str | None, typer.Option("--hosts", help="Overrides hosts.kind.")] = None,
    out: Out = RUNS,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure how fast a guest dirties memory; predict migrations.

    The predictions are for each of the four ways to skip pages: none, zero, hint, both.
    """
    with told():
        from testbed.experiments.dirty_rate import dirty_rate_report, measured_rate

        measured = measured_rate(
            scenario, session_dir, unnamed(seed, hosts), overrides or (),
            out=out, period=period, periods=periods, rate=rate,
        )  # fmt: skip
        if as_json:
            print_json(measured.to_dict())
        else:
            print_table(dirty_rate_report(measured))


@app.command()
def check(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A directory under runs/.")],
    as_json: Json = False,
) -> None:
    """Judge a recorded run again, from its directory alone."""
    with told():
        from testbed.checkers import judge
        from testbed.record.run_record import load
        from testbed.report.result import build
        from testbed.report.tables import findings_table

        record = load(run_dir)
        judgement = judge(record)
        if as_json:
            print_json({**judgement.to_dict(), "result": build(record, judgement).to_dict()})
        else:
            print_table(findings_table(judgement))
        leave_with([judgement.exit_code])


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do, and what each feature lacks."""
    with told():
        from testbed.machine.doctor import examine, fit, to_dict
        from testbed.report.tables import doctor_table

        checkups = examine()
        if as_json:
            print_json(to_dict(checkups))
        else:
            print_table(doctor_table(checkups))
        leave_with([0 if fit(checkups) else 3])


@app.command()
def clean(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what crashed runs left behind, and only that.

    Processes, containers, networks and directories that carry Ballast's label.
    """
    with told():
        from testbed.hosts.clean import look, remove

        found, problems = look()
        for problem in problems:
            typer.echo(f"ballast: {problem}", err=True)
        removed = [str(left) for left in found if dry_run or remove(left)]
        if as_json:
            print_json({"schema": 1, "dry_run": dry_run, "removed": removed})
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
