"""What every command has in common: how it ends, and how it prints.

Rule 1: results go to standard output, everything else to standard error; an error is a line, no traceback.
Rule 2: every command's exit code is made here.
"""
# ruff: noqa: PLC0415 - rich is imported when something is printed

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType


@contextmanager
def told() -> Iterator[None]:
    """Turns this package's errors into lines and an exit code."""
    try:
        yield
    except TestbedError as error:
        for problem in error.problems:
            typer.echo(f"ballast: {problem}", err=True)
        raise typer.Exit(error.exit_code) from None


def leave_with(codes: Iterable[int]) -> None:
    """The gravest of the codes: invalid before unknown before fine."""
    gravest = max(codes, key=(0, 4, 1, 2, 3).index, default=0)
    if gravest:
        raise typer.Exit(gravest)


def print_table(renderable: RenderableType) -> None:
    """What people read, as wide as the terminal."""
    from rich.console import Console

    # Where nobody set a width (a pipe, a log) the tables get as much room as they need.
    chosen = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if chosen else 120).print(renderable)


def print_json(document: dict[str, Any]) -> None:
    """What programs read: one object."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
