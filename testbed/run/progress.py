"""What a waiting human, or a waiting program, sees while runs are under way.

Rule 1: progress is told from the run's own events and changes nothing.
Rule 2: on a terminal it is one line per run; elsewhere it is JSON lines on stderr, one per event.
Rule 3: standard output belongs to results.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from testbed.units import PAGE_BYTES, format_bytes, format_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from testbed.history import Event
    from testbed.run.runner import FinishedRun


class Display(Protocol):
    """Shows runs under way."""

    def begin(self, label: str) -> Callable[[Event], None]:
        """A run begins; the result is told every event of it, from any thread."""

    def finish(self, label: str, run: FinishedRun) -> None:
        """The run ended."""


class JsonLines:
    """For programs: every event as a line."""

    def begin(self, label: str) -> Callable[[Event], None]:
        """See Display."""

        def show(event: Event) -> None:
            sys.stderr.write(json.dumps({"run": label, **event.to_dict()}, ensure_ascii=False) + "\n")

        return show

    def finish(self, label: str, run: FinishedRun) -> None:
        """See Display."""
        summary = {
            "run": label,
            "name": "judged",
            "outcome": run.result.outcome,
            "verdict": run.result.verdict,
        }
        sys.stderr.write(json.dumps(summary) + "\n")


# What is happening from this event on, in a human's words.
STEPS: Final = {
    "run_started": "starting two hosts",
    "image_build_started": "building the image of the hosts (once)",
    "image_built": "starting two hosts",
    "node_described": "the guest boots",
    "guest_ready": "the guest settles",
    "migration_requested": "setting up",
    "migration_retried": "waiting for the next attempt",
    "hints_opened": "asking the guest for its free pages",
    "guest_paused": "switching over",
    "prepared": "switching over",
    "committed": "the guest runs at the destination",
    "guest_running": "the guest runs on; both memories are hashed",
    "guest_checked": "collecting the evidence",
    "interrupted": "cancelling (once more: hurry)",
    "run_broken": "taking everything down",
}


STEP_CHARACTERS: Final = 60


class Speedometer:
    """Payload rate since the previous report."""

    def __init__(self) -> None:
        self._at_ns = 0
        self._payload_bytes = 0

    def rate_bytes_per_s(self, at_ns: int, payload_bytes: int) -> float:
        """The rate between the last report and this one; 0 at the first."""
        elapsed_ns, carried = at_ns - self._at_ns, payload_bytes - self._payload_bytes
        first, self._at_ns, self._payload_bytes = not self._at_ns, at_ns, payload_bytes
        return 0.0 if first or elapsed_ns <= 0 else carried * 1e9 / elapsed_ns


class TerminalLines:
    """For people: a line with a bar per run."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def begin(self, label: str) -> Callable[[Event], None]:
        """See Display."""
        task = self._progress.add_task(label, total=None, step="", detail="")
        self._tasks[label] = task
        speed = Speedometer()

        def show(event: Event) -> None:
            fields = event.fields
            if event.name in STEPS:
                self._progress.update(task, step=STEPS[event.name], detail="")
            elif event.name == "image_build_step":
                self._progress.update(task, detail=str(fields["step"])[:STEP_CHARACTERS])
            elif event.name == "round_started":
                total = fields["candidate_pages"]
                self._progress.update(
                    task, total=total or 1, completed=0, step=f"round {fields['round']}", detail=""
                )
            elif event.name == "round_ended":
                self._progress.update(task, completed=fields["candidate_pages"] or 1)
            elif event.name == "progress":
                done = fields["sent_pages"] + fields["zero_pages"] + fields["skipped_pages"]
                rate = speed.rate_bytes_per_s(event.at_ns, fields["payload_bytes"])
                detail = _outlook(rate, fields)
                self._progress.update(task, completed=done, step=f"round {fields['round']}", detail=detail)

        return show

    def finish(self, label: str, run: FinishedRun) -> None:
        """See Display."""
        result = run.result
        mark = {"valid": "[green]✓", "invalid": "[red]✗", "unknown": "[yellow]?"}[result.verdict]
        step = f"{mark} {result.outcome}[/] in {format_ms(result.total_ms)}"
        self._progress.update(
            self._tasks[label], total=1, completed=1, step=step, detail=f"proof {result.verdict}"
        )


@contextmanager
def display() -> Iterator[Display]:
    """The display that fits where stderr goes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield JsonLines()
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(show_speed=False),
        TextColumn("{task.fields[step]}"),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield TerminalLines(progress)


def _outlook(rate_bytes_per_s: float, fields: Mapping[str, Any]) -> str:
    """The rate, what is left, how the guest writes, and what is to come, as far as it is known."""
    remaining_bytes = fields.get("remaining_bytes", fields["remaining_pages"] * PAGE_BYTES)
    parts = [f"{format_bytes(rate_bytes_per_s)}/s"] if rate_bytes_per_s > 0 else []
    parts.append(f"{format_bytes(remaining_bytes)} left")
    if fields.get("dirty_pages_per_s") is not None:
        parts.append(f"dirties {format_bytes(fields['dirty_pages_per_s'] * PAGE_BYTES)}/s")
    if fields.get("expected_downtime_ms") is not None:
        parts.append(f"downtime about {format_ms(fields['expected_downtime_ms'])}")
    if fields.get("eta_ms") is not None:
        known = fields.get("dirty_pages_per_s") is not None
        parts.append(f"over in {'about' if known else 'at least'} {format_ms(fields['eta_ms'])}")
    return ", ".join(parts)
