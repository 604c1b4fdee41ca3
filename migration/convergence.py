"""Whether rounds still shrink, how much slower a guest is made that outruns them, and how fast the link is now.

Rule 1: all of it is arithmetic over what the rounds measured; nothing here acts.
Rule 2: what is compared is what a stop would have to send: the pages dirty in the harvest that ended a round.
Rule 3: rounds are compared under one throttle only: a step begins a new comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from migration.errors import LocalProtocolError

# One round that does not shrink is noise (a burst, a checkpoint); two in a row are the rule elsewhere, too.
STALL_ROUNDS = 2
SHRINK_MIN = 0.05  # by so much the best of them must be below the best before, or nothing is gained
THROTTLE_PERCENT_MAX = 99  # slowed, never stopped
# The newest rounds are as fast as the link is now; shorter spans than this measure the scheduler.
RATE_SPAN_NS = 200_000_000


@dataclass(frozen=True, slots=True)
class ThrottleSteps:
    """Auto-converge: the share of its time that the vCPU sleeps, in percent."""

    start_percent: int
    increment_percent: int
    maximum_percent: int

    def __post_init__(self) -> None:
        if not 0 < self.start_percent <= self.maximum_percent <= THROTTLE_PERCENT_MAX:
            raise LocalProtocolError(
                f"a throttle starts between 1 and its maximum of at most {THROTTLE_PERCENT_MAX} percent",
                start=self.start_percent,
                maximum=self.maximum_percent,
            )
        if self.increment_percent < 1:
            raise LocalProtocolError(
                "a throttle's increment is at least 1 percent", value=self.increment_percent
            )

    def after(self, percent: int) -> int:
        """The step that follows; the maximum follows itself."""
        if percent == 0:
            return self.start_percent
        return min(percent + self.increment_percent, self.maximum_percent)


def stalled(remaining: Sequence[int]) -> bool:
    """Whether the last STALL_ROUNDS rounds brought nothing; `remaining` is pages per round, oldest first."""
    if len(remaining) <= STALL_ROUNDS:
        return False
    best_before = min(remaining[:-STALL_ROUNDS])
    return min(remaining[-STALL_ROUNDS:]) > best_before * (1 - SHRINK_MIN)


def at_local_minimum(remaining: Sequence[int]) -> bool:
    """Whether the last round left no more than the rounds that it is compared with: a good moment to stop."""
    return remaining[-1] <= min(remaining[-STALL_ROUNDS - 1 :])


def recent_rate(payload_bytes: Sequence[int], sending_ns: Sequence[int]) -> float:
    """Payload per second over the newest rounds that took at least RATE_SPAN_NS together, oldest first.

    0 when nothing was sent at all.
    """
    total_bytes = total_ns = 0
    for bytes_, ns in zip(reversed(payload_bytes), reversed(sending_ns), strict=True):
        total_bytes += bytes_
        total_ns += ns
        if total_bytes and total_ns >= RATE_SPAN_NS:
            break
    return total_bytes * 1e9 / total_ns if total_ns else 0.0
