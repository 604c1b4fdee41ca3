"""One line in the history when a hint report opens, and one when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.clock import now_ns

if TYPE_CHECKING:
    from host.event_log import EventLog
    from migration.events import HintsReported


class HintLog:
    """Follows one report at a time."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._command_id = 0
        self._round_index = 0
        self._opened_ns = 0
        self._ended = True
        self.ranges = 0
        self._pages = 0

    def opened(self, command_id: int, round_index: int) -> None:
        """A command id was issued."""
        self._command_id, self._round_index = command_id, round_index
        self._opened_ns, self._ended = now_ns(), False
        self.ranges = self._pages = 0
        self._events.add("hints_opened", round=round_index, command_id=command_id)

    def reported(self, report: HintsReported) -> None:
        """Ranges arrived, or the guest's STOP."""
        self.ranges += len(report.pfn_first)
        self._pages += int(report.page_count.sum())
        if report.stopped:
            self._end("stop")

    def closed(self, last: HintsReported) -> None:
        """The round ended; the report ends with it if the guest had not stopped by itself."""
        self.reported(last)
        self._end("round_end")

    def _end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        self._events.add(
            "hints_stopped",
            round=self._round_index,
            command_id=self._command_id,
            duration_ms=(now_ns() - self._opened_ns) / 1e6,
            ranges=self.ranges,
            pages=self._pages,
            reason=reason,
        )
