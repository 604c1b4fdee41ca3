"""Options and arguments that several commands share, so that they mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
ScenarioPath = Annotated[
    Path, typer.Argument(metavar="SCENARIO.toml", help="A file; examples are in scenarios/.")
]
RUNS = Path("runs")
SessionDir = Annotated[
    Path | None,
    typer.Option(
        "--session", metavar="DIR", help="Run directory of the session; the newest live one unless said."
    ),
]


def unnamed(
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
