"""The course of a migration in lines for a person: what was estimated, tried again, recovered, and throttled.

Rule 1: a line is there only when there is something to tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from testbed.units import format_ms

PARTS_SHOWN: Final = 3

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.analysis.decided import ThrottlePart
    from testbed.report.result import Result


def course_lines(result: Result) -> Iterator[tuple[str, str]]:
    """(label, line), in the order of the report."""
    if result.downtime_ms_estimated is not None and result.outcome in ("completed", "rehearsal"):
        yield "estimate", _estimate(result)
    if result.attempts > 1:
        yield "attempts", f"{result.attempts}: the last one is shown"
    recoveries = result.recoveries
    if recoveries.count:
        yield (
            "recoveries",
            (
                f"{recoveries.count}, {format_ms(recoveries.paused_ms)} without a link, "
                f"{recoveries.resent_pages:,} pages sent again"
            ),
        )
    if result.throttle.maximum_percent:
        yield "throttle", _throttle(result.throttle)


def _estimate(result: Result) -> str:
    """Both figures, and the parts that made the difference."""
    foreseen, was = result.downtime_parts_ms_estimated, result.downtime_parts_ms
    parts = sorted(foreseen, key=lambda name: abs(was.get(name, 0.0) - foreseen[name]), reverse=True)
    shown = ", ".join(
        f"{name} {format_ms(foreseen[name])} (measured {format_ms(was.get(name, 0.0))})"
        for name in parts[:PARTS_SHOWN]
    )
    estimated, measured = format_ms(result.downtime_ms_estimated or 0.0), format_ms(result.downtime_ms)
    whole = f"{estimated} of downtime (measured {measured})"
    return f"{whole}; most apart: {shown}" if shown else whole


def _throttle(throttle: ThrottlePart) -> str:
    cost = throttle.operations_expected - throttle.operations
    share = f" ({cost / throttle.operations_expected:.0%})" if throttle.operations_expected else ""
    return (
        f"up to {throttle.maximum_percent} %, for {format_ms(throttle.throttled_ms)}: "
        f"it cost the guest {max(cost, 0):,} operations{share if cost > 0 else ''}"
    )
