"""A standing session as people see it: its hosts, where the guest is, what is broken on purpose.

Rule 1: a state is a word; colour only repeats it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from testbed.report.fitting_table import FittingTable
from testbed.units import PAGE_BYTES, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType


def status_table(status: dict[str, Any]) -> RenderableType:
    """Hosts, faults, and what was done so far."""
    table = FittingTable()
    table.add_column("host", no_wrap=True)
    table.add_column("guest")
    for heading in ("node", "agent"):
        table.add_column(heading, no_wrap=True)
    table.figures("free", "balloon", "held by\nhints", "operations")
    for host in status["hosts"]:
        table.add_row(*_host_row(host))
    has_it = [host["host"] for host in status["hosts"] if host["has_guest"]]
    where = f"the guest is on host {' and '.join(has_it)}" if has_it else "no host says that it has the guest"
    parts: list[RenderableType] = [Text(f"session {status['session']}\n{where}\n"), table, Text()]
    parts += [
        Text(f"{host['host']}: {host['problem']}", style="yellow")
        for host in status["hosts"]
        if host.get("problem")
    ]
    done = status["migrations"]
    if done:
        parts.append(Text("migrations: " + ", ".join(f"leg {one['leg']} {one['outcome']}" for one in done)))
    parts.append(faults_table(status["faults"]))
    return Group(*parts)


def faults_table(faults: Sequence[dict[str, Any]]) -> RenderableType:
    """The faults in force."""
    if not faults:
        return Text("no fault is in force")
    table = FittingTable()
    for heading in ("fault", "kind", "host"):
        table.add_column(heading, no_wrap=True)
    table.add_column("parameters", overflow="fold")
    for fault in faults:
        chosen = {key: value for key, value in fault["parameters"].items() if value is not None}
        parameters = " ".join(f"{key}={value}" for key, value in chosen.items())
        table.add_row(str(fault["id"]), fault["kind"], fault["host"], parameters)
    return table


def _host_row(host: dict[str, Any]) -> list[str | Text]:
    guest = Text(host["guest"], style="bold green" if host["has_guest"] else "")
    row: list[str | Text] = [host["host"], guest]
    row += [_process(host[f"{part}_pid"], alive=host[f"{part}_alive"]) for part in ("node", "agent")]
    if not host["has_guest"]:
        return [*row, "", "", "", ""]
    balloon = format_bytes(host["balloon_pages"] * PAGE_BYTES)
    if host["balloon_pages"] != host["balloon_target_pages"]:
        balloon += f" of\n{format_bytes(host['balloon_target_pages'] * PAGE_BYTES)}"
    return [
        *row,
        format_bytes(host["free_pages"] * PAGE_BYTES),
        balloon,
        format_bytes(host["held_pages"] * PAGE_BYTES),
        f"{host['operations']:,}",
    ]


def _process(pid: int, *, alive: bool) -> Text:
    return Text(str(pid) if alive else "dead", style="" if alive else "bold red")
