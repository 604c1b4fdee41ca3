"""A connection that was lost and may come back: what to ask, when to ask again, and what it cost.

Rule 1: what a loss means is a matter of the phase alone, as data (RECOVERIES).
Rule 2: the destination is asked at once, and after every failure again a moment later, until the link's time is
        over; one timer stands for all of it, whatever the machine does meanwhile.
Rule 3: a guest that stands still waits for the link as well: for that there is a shorter time of its own.
Rule 4: the streams go on only after the destination said what it has stored. News of the lost connection that
        come late change nothing but the moment of the next question.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING

from migration.commands import (
    ArmTimer,
    DisarmTimer,
    Note,
    OpenDestination,
    ResumeDestination,
    ResumeStreams,
    SendPrepare,
    SourceCommand,
)
from migration.events import Timer
from migration.source_phases import RECOVERIES, Recovery

if TYPE_CHECKING:
    from migration.events import DestinationResumed
    from migration.identity import AttemptKey
    from migration.rounds import Limits
    from migration.source_phases import SourcePhase

LINK_RETRY_MS = 200  # gRPC itself waits as long before it connects anew


class Link(Enum):
    """Where the connection stands."""

    UP = auto()
    WAITING = auto()  # to ask again
    ASKING = auto()
    RESUMING = auto()  # the destination answered; the streams are being opened anew


class LinkRecovery:
    """The connection of one attempt."""

    def __init__(self, key: AttemptKey, limits: Limits) -> None:
        self.state = Link.UP
        self.lost_at_ns = 0
        self.reason = ""
        self.count = 0
        self.paused_ns = 0
        self.resent_pages = 0
        self._key = key
        self._limits = limits
        self._limit = ""  # that was in force when it was lost, in words
        self._lost_again = False

    @property
    def up(self) -> bool:
        """Whether pages may be sent."""
        return self.state is Link.UP

    def patience(self, *, paused: bool) -> tuple[str, int]:
        """The time that a link lost now has to come back: its name, and ms (0: none). `paused`: the guest is."""
        limits = self._limits
        if paused and limits.link_timeout_paused_ms is not None:
            return "link_timeout_paused", min(limits.link_timeout_paused_ms, limits.link_timeout_ms)
        return "link_timeout", limits.link_timeout_ms

    def lost(
        self, phase: SourcePhase, question: SendPrepare | None, reason: str, now_ns: int, *, paused: bool
    ) -> list[SourceCommand]:
        """The connection broke, or could not be had again. `question`: the Prepare that may be asked again."""
        if self.state is Link.UP:
            name, patience_ms = self.patience(paused=paused)
            self._limit = f"{name} = {patience_ms} ms"
            self.lost_at_ns, self.reason, self._lost_again = now_ns, reason, False
            note = Note("link_lost", {"phase": phase.name, "reason": reason, "link_timeout_ms": patience_ms})
            return [note, ArmTimer(Timer.LINK, patience_ms), *self.ask(phase, question)]
        if self.state is Link.RESUMING:
            self._lost_again = True
            return []
        self.state = Link.WAITING
        return [ArmTimer(Timer.LINK_RETRY, LINK_RETRY_MS)]

    def ask(self, phase: SourcePhase, question: SendPrepare | None) -> list[SourceCommand]:
        """Ask the destination whether it is there, in the way that the phase wants."""
        self.state = Link.ASKING
        match RECOVERIES[phase]:
            case Recovery.OPEN_AGAIN:
                return [OpenDestination(self._key)]
            case Recovery.ASK_AGAIN:
                assert question is not None, "Prepare is asked again with what it said"
                return [question]
            case _:
                return [ResumeDestination(self._key)]

    def answered(self, event: DestinationResumed) -> list[SourceCommand]:
        """The destination is there. Late answers of a link that is up, or being resumed, mean nothing."""
        if self.state in (Link.UP, Link.RESUMING):
            return []
        self.state = Link.RESUMING
        return [DisarmTimer(Timer.LINK_RETRY), ResumeStreams(event.stored_below)]

    def resumed(self, phase: SourcePhase, resent_pages: int, now_ns: int) -> list[SourceCommand]:
        """The streams are open again; if they broke at once, the destination is asked again."""
        self.resent_pages += resent_pages
        if self._lost_again:
            self._lost_again = False
            return self.ask(phase, None)
        return self.restored(now_ns, resent_pages)

    def restored(self, now_ns: int, resent_pages: int = 0) -> list[SourceCommand]:
        """The link works again. Nothing to do when it was never lost."""
        if self.state is Link.UP:
            return []
        self.state = Link.UP
        self.count += 1
        paused_ns = now_ns - self.lost_at_ns
        self.paused_ns += paused_ns
        return [
            DisarmTimer(Timer.LINK),
            DisarmTimer(Timer.LINK_RETRY),
            Note("link_restored", {"paused_ms": paused_ns / 1e6, "resent_pages": resent_pages}),
        ]

    def given_up(self) -> str:
        """Why the attempt ends, once the time is over."""
        return f"the link stayed lost beyond {self._limit} ({self.reason})"

    def to_dict(self) -> dict[str, object]:
        """The result document's `recoveries`."""
        return {"count": self.count, "paused_ms": self.paused_ns / 1e6, "resent_pages": self.resent_pages}
