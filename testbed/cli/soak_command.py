"""`ballast soak`.

Rule 1: as in commands.py: arguments in, one function of another module, lines or one JSON object out.
"""
# ruff: noqa: PLC0415 - what a command needs is imported when it runs

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from testbed.cli.options import RUNS
from testbed.cli.output import leave_with, print_json, told

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.experiments.soak import Drawn, Line, Soaked


def register(app: typer.Typer) -> None:
    """Adds the command to `ballast`."""
    app.command()(soak)


def soak(
    *,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="Until then; without it until Ctrl-C.")
    ] = None,
    hosts: Annotated[str, typer.Option("--hosts", help="local or docker (containers).")] = "local",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of everything that is drawn.")] = None,
    only: Annotated[
        int | None, typer.Option("--only", metavar="N", min=1, help="Repeat run N of the seed, and no other.")
    ] = None,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Every crash at every point (docs/safety.md), once.")
    ] = False,
    cell: Annotated[
        str,
        typer.Option(
            "--cell", metavar="POINT/CRASH", help="One of them, as in commit.sent/both. 'list' names them."
        ),
    ] = "",
    out: Annotated[Path, typer.Option("--out", help="Where directories of runs that failed go.")] = RUNS,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the directories of all runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Run random scenarios, faults and crashes; keep what failed."""
    if cell == "list":
        _list_cells()
        return
    with told():
        import secrets

        from testbed.errors import UsageError
        from testbed.experiments import soak as soaking
        from testbed.interrupt import Interrupt

        chosen = secrets.randbelow(1 << 31) if seed is None else seed
        if only is not None and seed is None:
            raise UsageError(
                f"--only {only} repeats a run of a seed: say --seed too, as the failed run told it"
            )
        drawn = _drawn(chosen, hosts, only=only, matrix=matrix, cell=cell)
        typer.echo(f"ballast: seed {chosen}", err=True)
        with Interrupt() as interrupt:
            done = soaking.soak(
                drawn, out, interrupt, lambda line: _tell(line, chosen, as_json=as_json),
                seed=chosen, minutes=minutes, keep=keep,
            )  # fmt: skip
        if as_json:
            print_json(done.to_dict())
        else:
            typer.echo(_summary(done))
        leave_with([1 if done.failing else 0])


def _list_cells() -> None:
    from testbed.crashes.table import CELLS, CRASHES

    for known in CELLS:
        typer.echo(f"{known.name:28} {CRASHES[known.crash]}: {known.outcome}")


def _drawn(seed: int, hosts: str, *, only: int | None, matrix: bool, cell: str) -> Iterator[Drawn]:
    from testbed.crashes.table import cell_named
    from testbed.errors import UsageError
    from testbed.experiments import soak as soaking

    if hosts not in ("local", "docker"):
        raise UsageError(f"--hosts {hosts!r}: local or docker")
    if sum((only is not None, matrix, bool(cell))) > 1:
        raise UsageError("--only, --matrix and --cell exclude each other")
    if cell:
        return iter([soaking.of_cell(cell_named(cell), 1, seed, hosts)])
    if matrix:
        return soaking.matrix(seed, hosts)
    runs = soaking.draw(seed, hosts, first=only or 1)
    return itertools.islice(runs, 1) if only is not None else runs


def _tell(line: Line, seed: int, *, as_json: bool) -> None:
    mark = "FAILED" if line.problems else "ok"
    drawn = line.drawn
    typer.echo(f"{drawn.number:5} {mark:6} {line.seconds:5.1f} s  {drawn.title}: {line.outcome}", err=as_json)
    for problem in line.problems:
        typer.echo(f"      {problem}", err=as_json)
    if line.problems:
        again = f'--cell "{drawn.cell.name}"' if drawn.cell is not None else f"--only {drawn.number}"
        typer.echo(f"      kept in {line.run_dir}; again: ballast soak --seed {seed} {again}", err=as_json)


def _summary(done: Soaked) -> str:
    failed = len(done.failing)
    runs = "1 run" if len(done.lines) == 1 else f"{len(done.lines)} runs"
    return f"{runs} in {done.seconds / 60:.1f} min, {failed} failed (seed {done.seed})"
