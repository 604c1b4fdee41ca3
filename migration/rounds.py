"""What comes after a pre-copy round: another one, one with a slower guest, the end of it, or giving up.

Rule 1: the decision is a pure function of what was measured and of what was asked for.
Rule 2: every decision carries one sentence with the figures it was made from.
Rule 3: the estimate counts every remaining page as 4096 payload bytes, never as a zero page: it errs to the
        side of one round too many.
Rule 4: only what the link showed counts; a configured bandwidth can lower the rate and never raise it,
        except where nothing was measured yet.
Rule 5: a timeout that means `switch` lets the round under way finish while the guest runs: its pages must cross
        anyway, and those that do so now are no downtime.
Rule 6: the estimate is of the whole stop, hand-over included. Rounds make only the sending shorter: where the
        hand-over alone is above the downtime limit and what is left hardly counts beside it, no round will keep
        that limit, and what was asked for beyond the last round is done at once. A limit of 0 is one that no
        stop keeps, and whoever states it wants every round.
Rule 7: a stall decides what `on_stall` says, and nothing by default: then only the stated limits decide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Literal, TypeAlias

from migration.convergence import STALL_ROUNDS, ThrottleSteps, at_local_minimum, stalled
from migration.errors import LocalProtocolError
from migration.handover import NO_TIME, Handover
from migration.pages import PAGE_BYTES

Surrender: TypeAlias = Literal["switch", "cancel"]
OnStall: TypeAlias = Literal["none", "switch", "throttle", "cancel"]
SURRENDERS = ("switch", "cancel")
ON_STALL = ("none", "switch", "throttle", "cancel")

# Assumed while nothing was sent and no bandwidth is configured (a first round that was wholly hinted or zero
# measures nothing): what a plain 1 Gbit/s link carries. Too low costs one round; too high costs downtime.
RATE_BYTES_PER_S_ASSUMED = 118_000_000
HARDLY = 0.1  # of the hand-over: a round that could shorten the stop by less than this is not worth its pages


class DecisionKind(Enum):
    """What to do next."""

    NEXT_ROUND = auto()
    THROTTLE = auto()  # another round, with a guest slowed to `throttle_percent`
    STOP_COPY = auto()
    CANCEL = auto()
    HANDOVER = auto()  # after stop-and-copy: not decided, but told in the same words


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next, and why, in one sentence for the log and the report."""

    kind: DecisionKind
    reason: str
    throttle_percent: int = 0  # of THROTTLE
    downtime_ms_estimated: float = 0.0  # of a stop at this moment, from the pause until the guest runs there
    downtime_parts_ms: Mapping[str, float] = field(default_factory=dict)  # of it, by the names of handover.py


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scenario asked for. `bandwidth` is in bytes per second, None for unlimited."""

    rounds_max: int = 30
    downtime_limit_ms: float = 300.0
    timeout_ms: float = 60_000.0
    on_rounds_max: Surrender = "switch"
    on_timeout: Surrender = "cancel"
    on_stall: OnStall = "none"
    throttle: ThrottleSteps | None = None
    bandwidth: float | None = None
    link_timeout_ms: int = 0  # a lost connection may come back within this time; 0: it may not
    # And within this one while the guest stands still; None: the same.
    link_timeout_paused_ms: int | None = None

    def __post_init__(self) -> None:
        if self.rounds_max < 1 or self.downtime_limit_ms < 0 or self.timeout_ms <= 0:
            raise LocalProtocolError("limits out of range", rounds_max=self.rounds_max)
        if self.bandwidth is not None and self.bandwidth <= 0:
            raise LocalProtocolError("bandwidth must be above zero; None is unlimited")
        if self.on_rounds_max not in SURRENDERS:
            raise LocalProtocolError("on_rounds_max is neither switch nor cancel", value=self.on_rounds_max)
        if self.on_timeout not in SURRENDERS:
            raise LocalProtocolError("on_timeout is neither switch nor cancel", value=self.on_timeout)
        if self.on_stall not in ON_STALL:
            raise LocalProtocolError(f"on_stall is none of {', '.join(ON_STALL)}", value=self.on_stall)
        if (self.throttle is not None) != (self.on_stall == "throttle"):
            raise LocalProtocolError("on_stall = throttle and the throttle's steps go together")
        if min(self.link_timeout_ms, self.link_timeout_paused_ms or 0) < 0:
            raise LocalProtocolError("a link timeout is below zero", link_timeout_ms=self.link_timeout_ms)


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What is known when a round has ended and its closing harvest is in."""

    index: int  # of the round that ended, 1-based
    elapsed_ms: float  # since the migration was asked for
    remaining_pages: int  # dirty in the closing harvest: what a stop now would have to send
    rate_bytes_per_s: float  # payload of the newest rounds, while sending; 0 when nothing was sent
    before: tuple[int, ...] = ()  # remaining_pages after the earlier rounds under this throttle, oldest first
    throttle_percent: int = 0  # in force during the round
    link_up: bool = True
    handover: Handover = NO_TIME


def estimated_rate(rate_bytes_per_s: float, limits: Limits) -> float:
    """The payload rate to reckon with, in bytes per second: measured, capped by the configured bandwidth."""
    if rate_bytes_per_s > 0:
        return min(rate_bytes_per_s, limits.bandwidth or math.inf)
    return limits.bandwidth or RATE_BYTES_PER_S_ASSUMED


def sending_ms(pages: int, rate_bytes_per_s: float) -> float:
    """How long sending so many pages takes, in milliseconds."""
    return pages * PAGE_BYTES * 1e3 / rate_bytes_per_s


def decide(stats: RoundStats, limits: Limits) -> Decision:
    """The rule. Reasons to stop come before reasons to give up: who converged late still converged."""
    rate = estimated_rate(stats.rate_bytes_per_s, limits)
    parts = stats.handover.parts(sending_ms(stats.remaining_pages, rate), rate)
    decision = replace(
        _rule(stats, limits, parts), downtime_ms_estimated=sum(parts.values()), downtime_parts_ms=parts
    )
    if decision.kind is DecisionKind.STOP_COPY and not stats.link_up:
        reason = f"{decision.reason}; but the link is lost, and the guest does not stand still for that"
        return replace(decision, kind=DecisionKind.NEXT_ROUND, reason=reason)
    return decision


def _rule(stats: RoundStats, limits: Limits, parts: Mapping[str, float]) -> Decision:
    if stats.remaining_pages == 0:
        return Decision(DecisionKind.STOP_COPY, "nothing is left to send")
    downtime_ms, send_ms = sum(parts.values()), parts["send"]
    handover_ms = downtime_ms - send_ms
    figures = f"{stats.remaining_pages:,} pages left, about {downtime_ms:.1f} ms"
    if handover_ms > 0:
        figures += f" ({send_ms:.1f} to send them, {handover_ms:.1f} to hand over)"
    limit = f"the downtime limit of {limits.downtime_limit_ms:g} ms"
    if downtime_ms <= limits.downtime_limit_ms:
        return Decision(DecisionKind.STOP_COPY, f"{figures}, within {limit}")
    if 0 < limits.downtime_limit_ms < handover_ms and send_ms <= handover_ms * HARDLY:
        return _surrender(limits.on_rounds_max, f"{figures}, and no round brings it within {limit}")
    return _unconverged(stats, limits, figures, limit)


def _unconverged(stats: RoundStats, limits: Limits, figures: str, limit: str) -> Decision:
    """What the other limits say, and if none does, another round."""
    if stats.elapsed_ms >= limits.timeout_ms:
        return _surrender(
            limits.on_timeout, f"{figures}, and the timeout of {limits.timeout_ms:g} ms is over"
        )
    if stats.index >= limits.rounds_max:
        return _surrender(limits.on_rounds_max, f"{figures}, after the last of {limits.rounds_max} rounds")
    if limits.on_stall != "none" and stalled((*stats.before, stats.remaining_pages)):
        return _on_stall(stats, limits, figures)
    return Decision(DecisionKind.NEXT_ROUND, f"{figures}, above {limit}")


def _surrender(how: Surrender, reason: str) -> Decision:
    return Decision(DecisionKind.STOP_COPY if how == "switch" else DecisionKind.CANCEL, reason)


def _on_stall(stats: RoundStats, limits: Limits, figures: str) -> Decision:
    what = f"{figures}, no less than {STALL_ROUNDS} rounds ago: stalled"
    if limits.on_stall == "cancel":
        return Decision(DecisionKind.CANCEL, what)
    if limits.on_stall == "switch":
        if at_local_minimum((*stats.before, stats.remaining_pages)):
            return Decision(DecisionKind.STOP_COPY, f"{what}, and this is a local minimum")
        return Decision(DecisionKind.NEXT_ROUND, f"{what}, waiting for a local minimum")
    assert limits.throttle is not None, "on_stall = throttle comes with its steps"
    percent = limits.throttle.after(stats.throttle_percent)
    if percent == stats.throttle_percent:
        return Decision(
            DecisionKind.NEXT_ROUND, f"{what}, and the guest is throttled to the maximum of {percent} %"
        )
    return Decision(DecisionKind.THROTTLE, f"{what}, throttling the guest to {percent} %", percent)
