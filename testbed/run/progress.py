"""What a waiting human, or a waiting program, sees while runs are under way.

Rule 1: progress is told from the run's own events and changes nothing.
Rule 2: on a terminal it is one line per run; elsewhere every event is a line of JSON.
Rule 3: all of it goes to standard error: standard output belongs to results.
Rule 4: a line fits into its terminal: what it can do without is left out whole, and nothing is cut.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn
from rich.table import Table
from rich.text import Text

from testbed.run.steps import STEPS, Steps
from testbed.units import PAGE_BYTES, format_bytes, format_ms

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

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


BUILD_STEP_CHARACTERS: Final = 40  # beside its title and a short name on 80 columns
BAR_COLUMNS: Final = 24
# What lines do without, one after the other, until they fit; the percentage and the step are never among it.
LEFT_OUT_FIRST: Final = ("bar", "rate", "dirties", "downtime", "left", "eta", "build")
PERCENT_COLUMNS: Final = len("100%")
LABEL_COLUMNS_LEAST: Final = 8  # of a run's name, where nothing else can give way


class FittedProgress(Progress):
    """Lines that leave out what does not fit (Rule 4). A task has the fields `step`, with markup, and `detail`."""

    def __init__(self, console: Console) -> None:
        self._terminal = console  # first: the base draws its lines before it has a console
        super().__init__(console=console)

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """All lines, of one shape, so that their columns stand below each other."""
        shown = [task for task in tasks if task.visible]
        labels = [Text(task.description, style="bold") for task in shown]
        steps = [Text.from_markup(task.fields["step"]) for task in shown]
        fixed = _widest(labels) + 1 + PERCENT_COLUMNS + 1 + _widest(steps) + 1
        for count in range(len(LEFT_OUT_FIRST) + 1):
            left_out = LEFT_OUT_FIRST[:count]
            details = [_detail(task, left_out) for task in shown]
            bar = () if "bar" in left_out else (BarColumn(bar_width=BAR_COLUMNS),)
            too_wide = fixed + _widest(details) + len(bar) * (BAR_COLUMNS + 1) - self._terminal.width
            if too_wide <= 0:
                break
        else:
            room = max(LABEL_COLUMNS_LEAST, _widest(labels) - too_wide)
            for label in labels:
                label.truncate(room, overflow="ellipsis")
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        for _ in bar:
            table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=PERCENT_COLUMNS)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        gauges: tuple[ProgressColumn, ...] = (*bar, TaskProgressColumn())
        for task, label, step, detail in zip(shown, labels, steps, details, strict=True):
            table.add_row(label, *(gauge(task) for gauge in gauges), step, detail)
        return table


def _detail(task: Task, left_out: Collection[str]) -> Text:
    parts = (text for name, text in task.fields["detail"].items() if name not in left_out)
    return Text(", ".join(parts), style="dim")


def _widest(texts: Iterable[Text]) -> int:
    return max((text.cell_len for text in texts), default=0) or 1  # an empty column is one wide all the same


class TerminalLines:
    """For people at a terminal: a line per run."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def begin(self, label: str) -> Callable[[Event], None]:
        """See Display."""
        task = self._progress.add_task(label, total=None, step="", detail={})
        self._tasks[label] = task
        speed, steps = Speedometer(), Steps()

        def show(event: Event) -> None:
            fields = event.fields
            if event.name in STEPS:
                if step := steps.begun(event):
                    self._progress.update(task, step=step, detail={})
            elif event.name == "image_build_step":
                told = {"build": str(fields["step"])[:BUILD_STEP_CHARACTERS]}
                self._progress.update(task, step="building the image", detail=told)
            elif event.name == "round_started":
                total = fields["candidate_pages"]
                self._progress.update(
                    task, total=total or 1, completed=0, step=f"round {fields['round']}", detail={}
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
            self._tasks[label], total=1, completed=1, step=step, detail={"proof": f"proof {result.verdict}"}
        )


@contextmanager
def display() -> Iterator[Display]:
    """The display that fits where stderr goes."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield JsonLines()
        return
    with FittedProgress(console) as progress:
        yield TerminalLines(progress)


def _outlook(rate_bytes_per_s: float, fields: Mapping[str, Any]) -> dict[str, str]:
    """The rate, what is left, how the guest writes, and what is to come, as far as it is known."""
    remaining_bytes = fields.get("remaining_bytes", fields["remaining_pages"] * PAGE_BYTES)
    parts = {"rate": f"{format_bytes(rate_bytes_per_s)}/s"} if rate_bytes_per_s > 0 else {}
    parts["left"] = f"{format_bytes(remaining_bytes)} left"
    if fields.get("dirty_pages_per_s") is not None:
        parts["dirties"] = f"dirties {format_bytes(fields['dirty_pages_per_s'] * PAGE_BYTES)}/s"
    if fields.get("expected_downtime_ms") is not None:
        parts["downtime"] = f"downtime about {format_ms(fields['expected_downtime_ms'])}"
    if fields.get("eta_ms") is not None:
        known = fields.get("dirty_pages_per_s") is not None
        parts["eta"] = f"over in {'about' if known else 'at least'} {format_ms(fields['eta_ms'])}"
    return parts
