"""The course of a migration in lines for a person: what was estimated, tried again, recovered, and throttled.

Rule 1: a line is there only when there is something to tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.units import format_ms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.analysis.decided import ThrottlePart
    from testbed.report.result import Result


def course_lines(result: Result) -> Iterator[tuple[str, str]]:
    """(label, line), in the order of the report."""
    if result.downtime_ms_estimated is not None and result.outcome in ("completed", "rehearsal"):
        yield (
            "estimate",
            (
                f"{format_ms(result.downtime_ms_estimated)} to send what was left when the guest was paused; "
                f"it took {format_ms(result.downtime_parts_ms.get('send', 0.0))} of the downtime"
            ),
        )
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


def _throttle(throttle: ThrottlePart) -> str:
    cost = throttle.operations_expected - throttle.operations
    share = f" ({cost / throttle.operations_expected:.0%})" if throttle.operations_expected else ""
    return (
        f"up to {throttle.maximum_percent} %, for {format_ms(throttle.throttled_ms)}: "
        f"it cost the guest {max(cost, 0):,} operations{share if cost > 0 else ''}"
    )
