"""`ballast sim`: thousands of simulated worlds, and each of them again.

Rule 1: as in commands.py: arguments in, one function of another module, lines or one JSON object out.
Rule 2: exit code 0: no violation, or with --plant the planted bug was found; 1: the opposite, or (from
        COVERAGE_SEEDS seeds on) something was never reached.
"""
# ruff: noqa: PLC0415 - what a command needs is imported when it runs

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Self

import typer

from testbed.cli.options import Json
from testbed.cli.output import leave_with, print_json, told

if TYPE_CHECKING:
    from testbed.sim.plants import Plant
    from testbed.sim.runner import Summary
    from testbed.sim.simulation import Outcome

COVERAGE_SEEDS = 10_000  # so many must have reached everything


def register(app: typer.Typer) -> None:
    """Adds the command to `ballast`."""
    app.command()(sim)


def sim(
    *,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many worlds.")] = 1000,
    first: Annotated[int, typer.Option("--first", min=0, help="The first seed.")] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Play this one again, with its transcript.")
    ] = None,
    plant: Annotated[
        str,
        typer.Option(
            "--plant", metavar="NAME", help="Plant a known bug: it must be found. 'list' names them."
        ),
    ] = "",
    processes: Annotated[int, typer.Option("--processes", min=0, help="0: one a core.")] = 0,
    as_json: Json = False,
) -> None:
    """Simulate migrations in virtual time, with faults.

    The machines are the real ones; network, hosts, guest and faults are drawn from the seed.
    """
    from testbed.sim.plants import DESCRIPTIONS, Plant, plant_named

    if plant == "list":
        for known, what in DESCRIPTIONS.items():
            typer.echo(f"{known.value:40} {what}")
        return
    with told():
        planted = plant_named(plant) if plant else Plant.NONE
    if seed is not None:
        _replay(seed, planted, as_json=as_json)
        return
    from testbed.sim.runner import run_seeds

    wanted = planted is not Plant.NONE
    with _progress(seeds) as shown:
        summary = run_seeds(first, seeds, planted, shown, processes=processes, stop_at_first=wanted)
    if as_json:
        print_json(summary.to_dict())
    else:
        _report(summary)
    incomplete = not wanted and summary.seeds >= COVERAGE_SEEDS and bool(summary.unreached)
    leave_with([1 if bool(summary.failing) is not wanted or incomplete else 0])


def _replay(seed: int, plant: Plant, *, as_json: bool) -> None:
    from testbed.sim.minimise import minimised
    from testbed.sim.runner import violation
    from testbed.sim.simulation import simulate

    outcome = simulate(seed, plant, transcript=True)
    smallest = minimised(outcome, plant) if outcome.violation else None
    if as_json:
        print_json(violation(outcome) | {"minimised": violation(smallest) if smallest else None})
    else:
        for line in outcome.transcript:
            typer.echo(line)
        _tell(smallest or outcome, plant)
    leave_with([1 if bool(outcome.violation) is not bool(plant.value) else 0])


def _tell(outcome: Outcome, plant: Plant) -> None:
    """What broke, and under which schedule."""
    if not outcome.violation:
        typer.echo(f"seed {outcome.seed}: {outcome.steps} steps, every invariant holds")
        return
    typer.echo(f"\nseed {outcome.seed}: {outcome.violation}")
    for fault in outcome.options.faults:
        typer.echo(f"  {fault}")
    typer.echo(
        f"  again: ballast sim --seed {outcome.seed}{f' --plant {plant.value}' if plant.value else ''}"
    )


def _report(summary: Summary) -> None:
    document = summary.to_dict()
    for outcome in summary.smallest:
        for line in outcome.transcript:
            typer.echo(line)
        _tell(outcome, summary.plant)
    typer.echo(
        f"{document['seeds']} seeds in {document['seconds']:.1f} s ({document['seeds_per_second']:.0f} a second), "
        f"{document['steps']} steps, median {document['steps_median']} a seed, "
        f"{document['violations_count']} violations"
    )
    for group, names in summary.coverage.items():
        least = min(names, key=names.__getitem__)
        reached = sum(1 for count in names.values() if count)
        typer.echo(f"  {group:20} {reached} of {len(names)} reached; least {names[least]}: {least}")
    for missing in summary.unreached:
        typer.echo(f"  never reached: {missing}")


class _progress:  # noqa: N801 - a context manager that reads as a verb
    """On stderr: one line that changes at a terminal, lines of JSON elsewhere."""

    def __init__(self, seeds: int) -> None:
        self._seeds = seeds
        self._human = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, violations: int) -> None:
        if self._human:
            sys.stderr.write(f"\r{done:>8} of {self._seeds} seeds, {violations} violations ")
        else:
            sys.stderr.write(
                json.dumps({"seeds_done": done, "seeds": self._seeds, "violations": violations}) + "\n"
            )
        sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._human:
            sys.stderr.write("\n")
