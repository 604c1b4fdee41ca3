"""Results as people read them, with rich.

Rule 1: figures are rounded to three digits for the eye; whoever computes takes --json.
Rule 2: a verdict is a word and a colour, never a colour alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from testbed.analysis.predicted import comparison_line
from testbed.report.account_table import account_table
from testbed.report.course import course_lines
from testbed.report.fitting_table import FittingTable
from testbed.units import format_bytes, format_ms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

    from testbed.checkers import Judgement
    from testbed.machine.checkup import Checkup
    from testbed.report.comparison import Summary
    from testbed.report.result import PredictedPart, Result

VERDICT_STYLES: Final = {"valid": "bold green", "invalid": "bold red", "unknown": "bold yellow"}
REASONS_SHOWN: Final = 8
# Of a torn migration nobody can say which layer its bytes are of.
RECONCILED: Final = ("completed", "rehearsal")
BLACKOUT_NOTE: Final = (
    "blackout: what the guest itself saw; with integrity = full it stands still while its memory is hashed"
)


def demo_table(arms: Mapping[str, Result]) -> RenderableType:
    """The four arms side by side, and what the hints saved."""
    table = FittingTable(caption=BLACKOUT_NOTE)
    table.add_column("skipped", no_wrap=True)
    table.figures("payload", "wire", "total", "downtime", "blackout", "pages\nskipped")
    table.add_column("proof", no_wrap=True)
    names = {"none": "none", "zero": "zero pages", "hint": "hinted pages", "both": "both"}
    for arm, result in arms.items():
        table.add_row(
            Text(names.get(arm, arm), style="bold"),
            format_bytes(result.bytes.payload),
            format_bytes(result.bytes.wire_tx),
            format_ms(result.total_ms),
            format_ms(result.downtime_ms),
            _blackout(result),
            _percent(result.hints.skipped_pages, result.guest.pages),
            verdict_text(result),
        )
    parts: list[RenderableType] = [Text(), table]
    sentence = savings(arms)
    if sentence:
        parts.append(Text(sentence))
    if arms:
        place = os.path.commonpath([Path(result.run_dir).parent for result in arms.values()])
        parts.append(Text(f"recorded below {place}; judge again: ballast check RUN_DIR", style="dim"))
    return Group(*parts, *(_complaints(arm, result) for arm, result in arms.items() if result.reasons))


def savings(arms: Mapping[str, Result]) -> str:
    """One sentence that says what the hints saved; "" when an arm is missing or did not complete."""
    if any(arm not in arms or arms[arm].outcome != "completed" for arm in ("none", "zero", "hint", "both")):
        return ""
    none, zero, hint = arms["none"], arms["zero"], arms["hint"]
    if not none.bytes.wire_tx or not none.total_ms:
        return ""
    saved = none.bytes.wire_tx - hint.bytes.wire_tx
    faster = _percent(none.total_ms - hint.total_ms, none.total_ms)
    return (
        f"The hints saved {format_bytes(max(0, saved))} of {format_bytes(none.bytes.wire_tx)} on the wire "
        f"({_percent(saved, none.bytes.wire_tx)}) and {faster} of the time; looking for zero pages alone saved "
        f"{_percent(none.bytes.wire_tx - zero.bytes.wire_tx, none.bytes.wire_tx)} of the bytes."
    )


def run_report(result: Result) -> RenderableType:
    """One run: the rounds, the figures, the verdict."""
    rounds = FittingTable()
    rounds.figures("round", "time", "candidates", "sent", "zero", "skipped", "dirtied", "payload", "wire")
    for part in result.rounds:
        sent = (part.sent_pages, part.zero_pages, part.skipped_pages)
        pages = (part.candidate_pages, *sent, part.dirtied_pages)
        rounds.add_row(
            str(part.index),
            format_ms(part.duration_ms),
            *(f"{count:,}" for count in pages),
            format_bytes(part.payload_bytes),
            format_bytes(part.wire_bytes),
        )
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")  # a path has no place where it could be wrapped
    why = f": {result.outcome_reason}" if result.outcome_reason else ""
    for leg in result.legs:
        facts.add_row(f"leg {leg['leg']} {leg['from']}-{leg['to']}", _leg(leg))
    facts.add_row("outcome", f"{result.outcome}{why}")
    facts.add_row("proof", verdict_text(result))
    facts.add_row(
        "time",
        f"total {format_ms(result.total_ms)}, downtime {format_ms(result.downtime_ms)}, "
        f"blackout as the guest saw it {_blackout(result)}",
    )
    for label, line in course_lines(result):
        facts.add_row(label, line)
    counted = result.bytes
    facts.add_row(
        "bytes",
        f"payload {format_bytes(counted.payload)}, messages {format_bytes(counted.grpc)}, "
        f"wire {format_bytes(counted.wire_tx)} ({counted.wire_source.replace('_', ' ').upper()})",
    )
    if result.hints.hinted_pages:
        facts.add_row("hints", _hints(result))
    if result.predicted is not None:
        facts.add_row("predicted", _predicted(result.predicted, result))
    facts.add_row("memory", _integrity(result))
    facts.add_row("recorded in", result.run_dir)
    parts: list[RenderableType] = [Text(), rounds] if result.rounds else []
    if result.account is not None and result.outcome in RECONCILED:
        parts.append(account_table(result.account))
    elif result.rounds:
        parts.append(Text())
    parts.append(facts)
    if result.reasons:
        parts.append(_complaints(result.scenario, result))
    return Group(*parts)


def _leg(leg: Mapping[str, Any]) -> str:
    """One leg in one line; the rounds and figures below are the last leg's."""
    return (
        f"{leg['outcome']}, {leg['verdict']}: total {format_ms(leg['total_ms'])}, "
        f"downtime {format_ms(leg['downtime_ms'])}, payload {format_bytes(leg['bytes']['payload'])}"
    )


def compare_table(summaries: Mapping[str, Summary]) -> RenderableType:
    """Medians with their range, one row per variant."""
    table = FittingTable(caption="median, least, most")
    table.add_column("variant", style="bold", overflow="fold")
    table.figures("payload", "wire", "total", "downtime", "blackout")
    table.add_column("proof", no_wrap=True)
    for name, summary in summaries.items():
        figures = summary.figures
        table.add_row(
            name,
            *(figures[key].text(format_bytes) for key in ("payload_bytes", "wire_tx_bytes")),
            *(figures[key].text(format_ms) for key in ("total_ms", "downtime_ms", "guest_blackout_ms")),
            Text(
                f"{summary.verdicts.count('valid')}/{len(summary.verdicts)} valid",
                style=VERDICT_STYLES[summary.worst_verdict],
            ),
            end_section=True,
        )
    return table


def verdict_text(result: Result) -> Text:
    """The verdict as a word in its colour."""
    return Text(result.verdict, style=VERDICT_STYLES[result.verdict])


def _complaints(label: str, result: Result) -> Text:
    text = Text(f"\n{label} is {result.verdict}:", style=VERDICT_STYLES[result.verdict])
    for reason in result.reasons[:REASONS_SHOWN]:
        text.append(f"\n  {reason}", style="default")
    if len(result.reasons) > REASONS_SHOWN:
        text.append(f"\n  and {len(result.reasons) - REASONS_SHOWN} more, see verdict.json", style="default")
    return text


def _predicted(foreseen: PredictedPart, result: Result) -> str:
    measured = {
        "rounds": len(result.rounds),
        "payload_bytes": result.bytes.payload,
        "total_ms": result.total_ms,
        "downtime_ms": result.downtime_ms,
    }
    return comparison_line(foreseen.model_dump(), measured)


def _integrity(result: Result) -> str:
    integrity = result.integrity
    if not integrity.compared_pages:
        return "not compared"
    return (
        f"{integrity.compared_pages:,} pages compared, {integrity.mismatches:,} differ; "
        f"{integrity.skipped_pages_proved_free:,} never sent and proved free"
    )


def _hints(result: Result) -> str:
    hints = result.hints
    return (
        f"{hints.hinted_pages:,} pages hinted: {hints.skipped_pages:,} skipped, {hints.late_pages:,} late, "
        f"{hints.absent_pages:,} not asked for; {hints.redirtied_pages:,} of the skipped written again"
    )


def _blackout(result: Result) -> str:
    return "-" if result.guest_blackout_ms is None else format_ms(result.guest_blackout_ms)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def findings_table(judgement: Judgement) -> RenderableType:
    """What each checker says."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("checker", style="bold", no_wrap=True)
    table.add_column("says", no_wrap=True)
    table.add_column("because", overflow="fold")
    for name, finding in judgement.findings.items():
        figures = [f"{key.replace('_', ' ')} {amount:,}" for key, amount in finding.figures.items()]
        verdict = finding.verdict.value
        because = "\n".join([*finding.reasons, *finding.notes, ", ".join(figures)]).strip()
        table.add_row(name, Text(verdict, style=VERDICT_STYLES[verdict]), because)
    verdict = judgement.verdict.value
    return Group(table, Text(f"The run is {verdict}.", style=VERDICT_STYLES[verdict]))


def doctor_table(checkups: Sequence[Checkup]) -> RenderableType:
    """What the machine can do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("capability", style="bold", no_wrap=True)
    table.add_column("found", overflow="fold")  # sockets and files: paths that no word wrap can shorten
    table.add_column("needed for", overflow="fold")
    for checkup in checkups:
        if checkup.ok:
            mark = Text("ok", style="green")
        else:
            mark = Text("lacks", style="bold red" if checkup.required else "yellow")
        needed = checkup.needed_for if checkup.ok else f"{checkup.needed_for}\n-> {checkup.remedy}"
        table.add_row(mark, checkup.name, checkup.found, needed)
    fit = all(checkup.ok for checkup in checkups if checkup.required)
    words = "This machine can run the demo and every local scenario it says ok to."
    return Group(table, Text(words if fit else "This machine cannot run migrations; see what it lacks."))
