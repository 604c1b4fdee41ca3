"""`ballast dirtyrate`: how fast a guest dirties memory, and what its migration would cost in each arm.

Rule 1: what was measured and what follows from the model are told apart; what the model assumed is said.
Rule 2: the prediction is for the scenario's own limits; only the arm differs.
Rule 3: a measurement is recorded like a run: a directory with its history, and the result as dirty_rate.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import ParseDict
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from migration.events import Skip
from migration.model import RATE_BYTES_PER_S_ASSUMED, Conditions, DirtyCurve, GuestPages, Prediction, predict
from migration.pb import node_pb2
from testbed.analysis.predicted import limits_of
from testbed.errors import RunBrokenError, UsageError
from testbed.interrupt import Interrupt
from testbed.record.run_dir import RunDir, write_json
from testbed.run.progress import display
from testbed.run.runner import record_run
from testbed.scenario.document import Scenario
from testbed.scenario.file import load
from testbed.standing.sessions import ask, choose, manifest_of
from testbed.units import PAGE_BYTES, format_bytes, format_ms, parse_duration_ms, parse_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rich.console import RenderableType

    from testbed.history import Event
    from testbed.run.session import Session
    from testbed.standing.sessions import StandingSession

RESULT = "dirty_rate.json"


@dataclass(frozen=True, slots=True)
class DirtyRate:
    """A measurement and what follows from it.

    Attributes:
        samples_pages_per_s: of each period. curve: (ms, distinct pages written by then).
        rate_bytes_per_s: what the predictions reckon with, and where it is from.
    """

    scenario: str
    run_dir: str
    tracker: str
    samples_pages_per_s: tuple[float, ...]
    curve: tuple[tuple[float, int], ...]
    guest: GuestPages
    rate_bytes_per_s: int
    rate_source: str
    predictions: dict[str, Prediction]

    @property
    def working_set_pages(self) -> int:
        """Distinct pages written while it was measured."""
        return self.curve[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        samples = self.samples_pages_per_s
        return {
            "schema": 1,
            "scenario": self.scenario,
            "run_dir": self.run_dir,
            "tracker": self.tracker,
            "dirty_rate": {
                "pages_per_s": {"median": median(samples), "min": min(samples), "max": max(samples)},
                "bytes_per_s": median(samples) * PAGE_BYTES,
                "samples_pages_per_s": list(samples),
            },
            "working_set_pages": self.working_set_pages,
            "working_set_bytes": self.working_set_pages * PAGE_BYTES,
            "working_set_curve": [{"ms": ms, "pages": pages} for ms, pages in self.curve],
            "guest": {
                "pages": self.guest.pages,
                "populated_pages": self.guest.populated,
                "free_pages": self.guest.free,
                "ballooned_pages": self.guest.ballooned,
            },
            "rate_bytes_per_s": self.rate_bytes_per_s,
            "rate_source": self.rate_source,
            "predictions": {arm: prediction.to_dict() for arm, prediction in self.predictions.items()},
        }


def parsed_period_ms(text: str) -> int:
    """An option's value. Raises UsageError."""
    return _parsed("--period", parse_duration_ms, text)


def parsed_rate(text: str) -> int:
    """An option's value in bytes per second, 0 when it was not given. Raises UsageError."""
    return _parsed("--rate", parse_rate, text) if text else 0


def _parsed(option: str, parse: Callable[[object], int], text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def measured_rate(
    scenario: Path | None,
    session_dir: Path | None,
    fixed: Sequence[str],
    overrides: Sequence[str],
    *,
    out: Path,
    period: str,
    periods: int,
    rate: str,
) -> DirtyRate:
    """What the command asks for: of a scenario's guest, which is booted for it, or of a standing session's.

    Raises:
        UsageError: both, or neither, or a session with options that only a scenario has. Else as the two below.
    """
    period_ms, rate_bytes_per_s = parsed_period_ms(period), parsed_rate(rate)
    if scenario is None:
        if session_dir is None or fixed or overrides:
            raise UsageError("give a SCENARIO.toml, or --session DIR without --set, --hosts and --seed")
        session = choose(session_dir)
        return session_dirty_rate(
            session, period_ms=period_ms, periods=periods, rate_bytes_per_s=rate_bytes_per_s
        )
    if session_dir is not None:
        raise UsageError("a scenario and --session DIR: measure one or the other")
    chosen = load(scenario, overrides, fixed)
    with Interrupt() as interrupt, display() as shown:
        return run_dirty_rate(
            chosen,
            out,
            interrupt,
            shown.begin(chosen.name),
            period_ms=period_ms,
            periods=periods,
            rate_bytes_per_s=rate_bytes_per_s,
        )


def run_dirty_rate(
    scenario: Scenario,
    out: Path,
    interrupt: Interrupt,
    watch: Callable[[Event], None],
    *,
    period_ms: int,
    periods: int,
    rate_bytes_per_s: int,
) -> DirtyRate:
    """Boots the scenario's guest, lets it settle, measures it, and takes everything down.

    Raises:
        MachineCannotError, UsageError: nothing was started. RunBrokenError, InterruptedRunError: it ended early.
    """
    replies: list[node_pb2.DirtyRateReply] = []

    def measure(session: Session) -> None:
        replies.append(session.measure_dirty_rate(period_ms, periods))

    run_dir, broken = record_run(scenario, out, interrupt, watch, measure)
    if broken is not None:
        raise broken
    if not replies:
        raise RunBrokenError("the measurement ended without samples")
    found = foreseen(scenario, replies[0], rate_bytes_per_s, str(run_dir.path))
    write_json(run_dir.path / RESULT, found.to_dict())
    return found


def session_dirty_rate(
    session: StandingSession, *, period_ms: int, periods: int, rate_bytes_per_s: int
) -> DirtyRate:
    """Measures the guest of a standing session, where it is. Raises as `standing.ask`."""
    answer = ask(session, {"command": "dirty_rate", "period_ms": period_ms, "periods": periods})
    reply = ParseDict(answer["reply"], node_pb2.DirtyRateReply())
    scenario = Scenario.model_validate(manifest_of(RunDir(session.run_dir))["scenario"])
    return foreseen(scenario, reply, rate_bytes_per_s, str(session.run_dir))


def foreseen(
    scenario: Scenario, reply: node_pb2.DirtyRateReply, rate_bytes_per_s: int, run_dir: str
) -> DirtyRate:
    """What follows from a measurement: pure. `rate_bytes_per_s` 0: not told."""
    samples = tuple(
        round(pages * 1e3 / ms, 1) for pages, ms in zip(reply.dirtied_pages, reply.period_ms, strict=True)
    )
    ends_ms = [sum(reply.period_ms[: count + 1]) for count in range(len(reply.period_ms))]
    curve = DirtyCurve([ms / 1e3 for ms in ends_ms], list(reply.cumulative_pages), reply.pages)
    guest = GuestPages(
        pages=reply.pages,
        populated=reply.populated_pages,
        free=reply.hintable_pages,
        ballooned=reply.ballooned_pages,
    )
    options = scenario.migration
    told = rate_bytes_per_s or RATE_BYTES_PER_S_ASSUMED
    source = "--rate" if rate_bytes_per_s else "assumed: one page stream of this program on two cores"
    if options.bandwidth and options.bandwidth < told:
        told, source = options.bandwidth, "migration.bandwidth"
    conditions = Conditions(told, limits_of(options))
    return DirtyRate(
        scenario=scenario.name,
        run_dir=run_dir,
        tracker=reply.tracker,
        samples_pages_per_s=samples,
        curve=tuple((round(ms, 3), pages) for ms, pages in zip(ends_ms, reply.cumulative_pages, strict=True)),
        guest=guest,
        rate_bytes_per_s=told,
        rate_source=source,
        predictions={skip.value: predict(guest, skip, curve, conditions) for skip in Skip},
    )


def dirty_rate_report(measured: DirtyRate) -> RenderableType:
    """The measurement and the prediction for each arm, for people."""
    samples = measured.samples_pages_per_s
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")  # a path has no place where it could be wrapped
    spread = f"{min(samples):,.0f} .. {max(samples):,.0f}"
    facts.add_row(
        "dirty rate",
        f"{median(samples):,.0f} pages/s ({spread}), {format_bytes(median(samples) * PAGE_BYTES)}/s",
    )
    first_ms, first_pages = measured.curve[0]
    facts.add_row(
        "working set",
        f"{measured.working_set_pages:,} pages ({format_bytes(measured.working_set_pages * PAGE_BYTES)}) in "
        f"{format_ms(measured.curve[-1][0])}; {first_pages:,} in the first {format_ms(first_ms)}",
    )
    guest = measured.guest
    facts.add_row(
        "memory",
        f"{guest.pages:,} pages: {guest.populated:,} with storage, {guest.free:,} free, "
        f"{guest.ballooned:,} ballooned",
    )
    facts.add_row("link", f"{format_bytes(measured.rate_bytes_per_s)}/s ({measured.rate_source})")
    facts.add_row("tracker", measured.tracker)
    facts.add_row("recorded in", measured.run_dir)
    arms = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="predicted", title_justify="left")
    arms.add_column("skipped", style="bold")
    for heading in ("rounds", "payload", "total", "downtime"):
        arms.add_column(heading, justify="right", no_wrap=True)
    arms.add_column("because")
    for arm, prediction in measured.predictions.items():
        arms.add_row(
            arm,
            str(prediction.rounds),
            format_bytes(prediction.payload_bytes),
            format_ms(prediction.total_ms),
            format_ms(prediction.downtime_ms),
            Text(prediction.reason, style="" if prediction.converges else "yellow"),
        )
    return Group(facts, Text(), arms)
