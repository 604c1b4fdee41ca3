"""What kind of world a seed is: guest, migration, link, and which faults come when. Drawn before anything happens.

A schedule is data: it can be printed, made smaller, and played again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from testbed.sim.draw import stream
from testbed.sim.points import DECISIVE, PHASES, POINTS

if TYPE_CHECKING:
    import random

PAGES = 256
FAULTS_MAX = 6
ACTIVE_MS = 300  # faults begin within this time of a world


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: at an instant, or when a process reaches a point for the nth time; it lasts `for_ms`."""

    kind: str
    at_ms: float | None = None
    point: str = ""
    nth: int = 1
    for_ms: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        when = f"at {self.at_ms:.1f} ms" if self.at_ms is not None else f"at {self.point}, time {self.nth}"
        lasting = f" for {self.for_ms:.1f} ms" if self.for_ms else ""
        share = f" ({self.amount:.0%})" if self.amount else ""
        return f"{self.kind}{share} {when}{lasting}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in ("kind", "at_ms", "point", "nth", "for_ms", "amount")}


@dataclass(frozen=True, slots=True)
class Options:
    """One world."""

    pages: int = PAGES
    legs: int = 1
    streams: int = 1
    touched: float = 0.8  # of RAM, since boot
    kept: float = 0.3
    writes: int = 4
    idle: float = 0.0  # chance, per slice, that the guest does nothing
    batch_pages: int = 2048
    skip: str = "both"
    compression: str = "none"
    delta_cache_pages: int = 0
    integrity: str = "full"
    hint_mode: str = "hold"
    hint_diligence: float = 1.0  # chance that the driver does something in a slice
    retake: float = 0.1  # chance, per slice, that a hinted block is taken back and written
    balloon: float = (
        0.0  # the share of RAM up to which the operator inflates it, now and then; 0: there is none
    )
    balloon_runs: bool = False  # by F_SG, and not as arrays of page numbers
    tells_host: bool = True  # MUST_TELL_HOST: waits for the host before it uses a deflated page
    reports: bool = False  # its free pages, all the time
    guest_lies: bool = False
    rehearsal: bool = False
    rounds_max: int = 4
    downtime_limit_ms: float = 0.5
    timeout_ms: float = 3_000.0
    on_timeout: str = "cancel"
    on_rounds_max: str = "switch"
    on_stall: str = "none"
    link_timeout_ms: int = 0
    link_timeout_paused_ms: int | None = None
    handover_ms: float = 0.0  # that a stop is expected to take beside its pages
    hint_wait_ms: int = 20
    latency_ms: float = 0.1
    jitter: float = 0.5
    bytes_per_second: float = 200e6
    faults: tuple[Fault, ...] = ()

    def with_faults(self, faults: tuple[Fault, ...]) -> Options:
        """The same world under another schedule."""
        return replace(self, faults=faults)


def draw(seed: int) -> Options:
    """The world of a seed."""
    dice, balloon = stream(seed, "options"), stream(seed, "balloon")
    large = dice.random() < 0.08
    on_stall = dice.choice(("none", "none", "none", "switch", "throttle", "cancel"))
    return Options(
        pages=1024 if large else PAGES,
        streams=2 if large else 1,
        legs=dice.choice((1, 1, 1, 2, 3)),
        touched=dice.uniform(0.5, 1.0),
        kept=dice.uniform(0.1, 0.4),
        writes=dice.randint(2, 12),
        idle=dice.choice((0.0, 0.0, 0.0, 0.0, 0.5, 0.97)),
        batch_pages=dice.choice((24, 64, 2048)),
        skip=dice.choice(("none", "zero", "hint", "hint", "both", "both", "both")),
        compression=dice.choice(("lz4", "zstd")) if dice.random() < 0.1 else "none",
        delta_cache_pages=64 if dice.random() < 0.1 else 0,
        integrity=dice.choice(("full", "stream", "stream")),
        hint_mode=dice.choice(("hold", "walk")),
        hint_diligence=dice.choice((1.0, 1.0, 1.0, 0.6, 0.4, 0.2, 0.05, 0.0)),
        retake=dice.choice((0.0, 0.2, 0.7)),
        balloon=balloon.choice((0.0, 0.0, 0.0, 0.15, 0.4)),
        balloon_runs=balloon.random() < 0.5,
        tells_host=balloon.random() < 0.6,
        reports=balloon.random() < 0.12,
        guest_lies=dice.random() < 0.1,
        rehearsal=dice.random() < 0.2,
        rounds_max=dice.randint(1, 7),
        downtime_limit_ms=dice.choice((0.0, 0.05, 0.5, 2.0)),
        timeout_ms=dice.choice((60.0, 200.0, 3_000.0, 3_000.0, 3_000.0)),
        on_timeout=dice.choice(("cancel", "switch")),
        on_rounds_max=dice.choice(("switch", "switch", "switch", "cancel")),
        on_stall=on_stall,
        link_timeout_ms=dice.choice((0, 300, 1_000)),
        hint_wait_ms=dice.choice((2, 10, 30)),
        latency_ms=dice.choice((0.05, 0.2, 1.0)),
        bytes_per_second=dice.choice((50e6, 200e6, 1e9)),
        link_timeout_paused_ms=dice.choice((None, None, 0, 60)),
        handover_ms=dice.choice((0.0, 0.0, 0.4, 20.0)),
        faults=draw_faults(stream(seed, "faults")),
    )


# Schedules that dice would need long to find: faults that must meet within a millisecond.
RECIPES: tuple[tuple[Fault, ...], ...] = (
    # The streams break when all is stored: the destination may hear of it when the guest is prepared, or runs.
    (
        Fault("reset connections", point="source.phase.SAVING", for_ms=0.05),
        Fault("hold source node", point="source.SendCommit.before", for_ms=30.0),
    ),
    # ... or does not start at once,
    (
        Fault("reset connections", point="source.phase.SAVING", for_ms=0.05),
        Fault("mute dest agent", point="dest.RunGuest.before", for_ms=40.0),
    ),
    # while somebody gives the attempt up again.
    (
        Fault("mute dest agent", point="dest.RunGuest.before", for_ms=40.0),
        Fault("repeat Abort", point="dest.RunGuest.after"),
    ),
    # An answer that is lost, of a destination that could not keep its word.
    (
        Fault("kill dest agent", point="source.SendCommit.before", for_ms=20.0),
        Fault("lose messages", point="dest.ConfirmGuest.before", for_ms=30.0, amount=0.8),
    ),
    # A lost link that comes back while the source is busy with something else.
    (Fault("overtake stream news", point="source.phase.DRAINING"),),
    (
        Fault("overtake stream news", point="source.phase.DRAINING"),
        Fault("hold source node", point="source.ResumeStreams.before", for_ms=30.0),
    ),
    (Fault("overtake stream news", point="source.phase.FINAL_DRAINING"),),
    (
        Fault("reset connections", point="source.phase.CLOSING_HINTS"),
        Fault("hold source node", point="source.phase.HARVESTING"),
    ),
    (
        Fault("reset connections", point="source.phase.PAUSING"),
        Fault("hold source node", point="source.phase.FINAL_HARVESTING"),
    ),
    # A journal that does not take the decision, or the end of it.
    (
        Fault("reset connections", point="source.phase.SAVING", for_ms=0.05),
        Fault("fill dest journal", point="dest.ConfirmGuest.after", for_ms=40.0),
    ),
    (
        Fault("mute dest agent", point="dest.ConfirmGuest.before", for_ms=10.0),
        Fault("fill dest journal", point="dest.DiscardImage.after", for_ms=30.0),
        Fault("repeat Prepare", point="dest.DiscardImage.after", nth=2),
    ),
    (
        Fault("stick a page writer", point="dest.VerifyImage.before"),
        Fault("fill dest journal", point="dest.DiscardImage.after", for_ms=30.0),
        Fault("repeat Prepare", point="source.ResumeGuest.after"),
        Fault("repeat Abort", point="source.AbortDestination.after"),
    ),
    # A rehearsal that is disturbed at its end.
    (Fault("cancel", point="source.phase.KEEPING_EVIDENCE"),),
    (Fault("cut source agent link", point="source.phase.KEEPING_EVIDENCE"),),
    (Fault("timers fire early", point="source.phase.KEEPING_EVIDENCE"),),
)
RECIPE_SHARE = 0.08


def draw_faults(dice: random.Random) -> tuple[Fault, ...]:
    """A schedule. A world in eight has none."""
    if dice.random() < RECIPE_SHARE:
        return dice.choice(RECIPES)
    count = 0 if dice.random() < 0.12 else dice.randint(1, FAULTS_MAX)
    storm = dice.random() < 0.2
    storms = (
        Fault(f"{word} messages", at_ms=0.0, for_ms=ACTIVE_MS, amount=0.2) for word in ("lose", "duplicate")
    )
    return (*(storms if storm else ()), *(draw_fault(dice) for _ in range(count)))


KINDS: dict[str, float] = {  # -> how often
    "crash source node": 3.0,
    "crash dest node": 3.0,
    "kill source agent": 0.5,
    "kill dest agent": 0.7,
    "reset connections": 4.0,
    "partition": 2.0,
    "partition one way": 1.0,
    "lose messages": 1.0,
    "duplicate messages": 1.5,
    "delay messages": 2.0,
    "reorder messages": 1.0,
    "hang source node": 1.0,
    "hang dest node": 1.0,
    "replace hung source node": 1.5,
    "replace hung dest node": 1.5,
    "cancel": 2.0,
    "hold source node": 3.0,
    "timers fire early": 1.2,
    "overtake stream news": 2.5,
    "refuse streams": 1.0,
    "refuse calls": 1.0,
    "mute source agent": 0.8,
    "mute dest agent": 1.5,
    "repeat Abort": 0.7,
    "repeat Prepare": 0.7,
    "stick a page writer": 0.7,
    "fill dest journal": 1.5,
    "cut source agent link": 1.0,
    "restart device": 0.7,
}
LASTING = {"lose messages", "duplicate messages", "delay messages", "reorder messages"}


def draw_fault(dice: random.Random) -> Fault:
    """One fault, half of them at a point of the protocol."""
    kind = dice.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    for_ms = dice.choice((3.0, 20.0, 100.0, 600.0))
    amount = dice.choice((0.05, 0.3, 0.8)) if kind in LASTING else 0.0
    if dice.random() < 0.6:
        point = dice.choice(dice.choice((DECISIVE, DECISIVE, POINTS, POINTS, PHASES, PHASES)))
        return Fault(kind, point=point, nth=dice.choice((1, 1, 1, 2, 3)), for_ms=for_ms, amount=amount)
    return Fault(kind, at_ms=dice.uniform(1.0, ACTIVE_MS), for_ms=for_ms, amount=amount)
