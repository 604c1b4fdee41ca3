"""Facts that a migration machine may be told. Past participles, frozen, one closed union per side.

Whatever is not in `SourceEvent` or `DestEvent` cannot happen to a machine. Arrays in events are handed
over: whoever posted one does not touch it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from migration.handover import NO_TIME, Handover
from migration.identity import AttemptKey
from migration.page_bits import PageBits
from migration.pages import BoolArray, U64Array
from migration.rounds import Limits


class Skip(Enum):
    """Which pages an arm leaves out: nothing, zero pages, hinted free pages, or both."""

    NONE = "none"
    ZERO = "zero"
    HINT = "hint"
    BOTH = "both"

    @property
    def uses_hints(self) -> bool:
        """Whether the guest is asked for its free pages."""
        return self in (Skip.HINT, Skip.BOTH)

    @property
    def detects_zero(self) -> bool:
        """Whether zero pages cross as records instead of payload."""
        return self in (Skip.ZERO, Skip.BOTH)


class Answer(Enum):
    """What a destination says about an attempt; UNKNOWN is no answer (DESIGN 3.4).

    VERIFIED is said of a rehearsal: its image was right, and the attempt is aborted, as was asked for.
    """

    UNKNOWN = 0
    PREPARED = 1
    COMMITTED = 2
    ABORTED = 3
    VERIFIED = 4


class Recorded(Enum):
    """States of an attempt in a journal. The source and the destination use the same words."""

    STARTED = "STARTED"
    RECEIVING = "RECEIVING"
    PREPARED = "PREPARED"
    COMMITTING = "COMMITTING"
    COMMITTED = "COMMITTED"
    COMPLETED = "COMPLETED"
    ABORTED = "ABORTED"


class Timer(Enum):
    """Named timers of the source machine; arming one again replaces it."""

    HINT_WAIT = "hint_wait"
    MIGRATION = "migration"
    COMMIT_RETRY = "commit_retry"
    LINK = "link"  # how long a lost connection may take to come back
    LINK_RETRY = "link_retry"


# --- source ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MigrationRequested:
    """The testbed asked for a migration."""

    key: AttemptKey
    pages: int
    skip: Skip
    limits: Limits
    hint_wait_ms: int
    rehearsal: bool = False  # everything but the hand-over


@dataclass(frozen=True, slots=True)
class CommitPending:
    """A restarted source found this attempt COMMITTING in its journal: only the destination can tell more."""

    key: AttemptKey
    image_digest: int


@dataclass(frozen=True, slots=True)
class DestinationOpened:
    """The destination holds zeroed memory for us, under this incarnation."""

    incarnation: str


@dataclass(frozen=True, slots=True)
class TrackingStarted:
    """From now on every write of the guest is in some later harvest.

    `ballooned`: in the balloon and a hole, looked up afterwards: neither read nor sent, as the destination
    has zeroes there and so has the guest when it takes them back. None: no such pages. `handover`: what the stop is
    expected to take beside its pages.
    """

    ballooned: PageBits | None = None
    handover: Handover = NO_TIME


@dataclass(frozen=True, slots=True)
class Harvested:
    """Pages written since the last harvest, shape (pages,); the tracker is armed anew for them.

    `ballooned`: not in `dirty`, since the balloon took them and the guest wrote none of them. None: no such pages.
    """

    dirty: BoolArray | PageBits
    ballooned: PageBits | None = None


@dataclass(frozen=True, slots=True)
class HintsOpened:
    """A command id was issued to the guest."""

    command_id: int


@dataclass(frozen=True, slots=True)
class HintsReported:
    """What the guest put on the hint queue: valid ranges of the open id, and counts of the rest."""

    command_id: int
    pfn_first: U64Array = field(default_factory=lambda: np.empty(0, np.uint64))
    page_count: U64Array = field(default_factory=lambda: np.empty(0, np.uint64))
    stopped: bool = False
    stale_pages: int = 0
    rejected_ranges: int = 0


@dataclass(frozen=True, slots=True)
class HintsClosed:
    """The id is closed and the queue is drained: `last` holds what was still in it."""

    last: HintsReported


@dataclass(frozen=True, slots=True)
class PagesSent:
    """A batch left for the destination."""

    data_pages: int
    zero_pages: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class AllAcknowledged:
    """The destination has stored every chunk sent so far."""


@dataclass(frozen=True, slots=True)
class GuestPaused:
    """All guest threads stopped, then the rings: nobody writes guest RAM any more."""


@dataclass(frozen=True, slots=True)
class GuestSaved:
    """vCPU and device state are in the shell's hands; the digest covers them and every page sent."""

    image_digest: int


@dataclass(frozen=True, slots=True)
class PrepareAnswered:
    """PREPARED (of a rehearsal: VERIFIED), or ABORTED with a reason."""

    answer: Answer
    reason: str = ""


@dataclass(frozen=True, slots=True)
class EvidenceKept:
    """What a judge will ask for about the paused guest is written down."""


@dataclass(frozen=True, slots=True)
class CommitAnswered:
    """COMMITTED and ABORTED are final; UNKNOWN is no answer."""

    answer: Answer
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StateRecorded:
    """The journal holds this state durably."""

    state: Recorded


@dataclass(frozen=True, slots=True)
class StateNotRecorded:
    """The journal of the destination could not be written. Whether the state is in it nobody knows for certain."""

    reason: str


@dataclass(frozen=True, slots=True)
class GuestResumed:
    """The guest runs on at the source."""


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer that was armed ran out."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The connection broke, or cannot be had again: it may come back."""

    reason: str


@dataclass(frozen=True, slots=True)
class DestinationResumed:
    """The destination goes on with this attempt; per stream, chunks with a lower sequence are stored."""

    stored_below: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StreamsResumed:
    """The page streams are open again, behind what is stored.

    They send the pages of lost chunks (`resent_pages`) again by themselves, and a batch or a wait that was under
    way is told as ever.
    """

    resent_pages: int


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The destination was never there, refused, or broke the protocol: asking again would change nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class HostFailed:
    """Something on this host failed: the guest agent, the tracker, the journal."""

    reason: str


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody asked to stop the migration."""

    reason: str


SourceEvent = (
    MigrationRequested
    | CommitPending
    | DestinationOpened
    | TrackingStarted
    | Harvested
    | HintsOpened
    | HintsReported
    | HintsClosed
    | PagesSent
    | AllAcknowledged
    | GuestPaused
    | GuestSaved
    | PrepareAnswered
    | EvidenceKept
    | CommitAnswered
    | StateRecorded
    | GuestResumed
    | TimerFired
    | LinkLost
    | DestinationResumed
    | StreamsResumed
    | PeerLost
    | HostFailed
    | CancelRequested
)

# --- destination ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRequested:
    """A source wants to send this guest. `idle`: no page stream of the attempt at hand is open.

    With `resume` it lost the connection and wants to go on with the memory of this very attempt. Within
    `link_timeout_ms` a lost connection may come back; 0: it may not.
    """

    key: AttemptKey
    memory_bytes: int
    idle: bool = False
    resume: bool = False
    link_timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class StreamBroken:
    """The connection of a page stream was lost: it ended in another way than by the source's half-close."""

    reason: str


@dataclass(frozen=True, slots=True)
class IntakeFailed:
    """Nothing more can come of this attempt: a chunk was refused, the silence lasted too long, the host ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class StreamsJoined:
    """Every page stream is cut, and nothing of it is being stored or ever will be."""


@dataclass(frozen=True, slots=True)
class PrepareRequested:
    """All pages are sent. `chunks` says how many there were, `image_digest` what they must add up to."""

    key: AttemptKey
    incarnation: str
    image_digest: int
    chunks: int
    rehearsal: bool = False  # verify, and let go


@dataclass(frozen=True, slots=True)
class ImageVerified:
    """Writers joined, digest equal, and (integrity full) RAM read back equal."""


@dataclass(frozen=True, slots=True)
class ImageRefused:
    """Verification or restore failed."""

    reason: str


@dataclass(frozen=True, slots=True)
class GuestRestored:
    """The standby agent holds RAM and state, and does not run."""


@dataclass(frozen=True, slots=True)
class CommitRequested:
    """The source can no longer go back by itself; it asks for the decision."""

    key: AttemptKey
    image_digest: int


@dataclass(frozen=True, slots=True)
class GuestStarted:
    """The guest runs here."""


@dataclass(frozen=True, slots=True)
class GuestStartFailed:
    """The agent did not start the guest this time; `lost` when its process is gone and nothing is left to run."""

    reason: str
    lost: bool


@dataclass(frozen=True, slots=True)
class GuestConfirmed:
    """The standby agent still holds the image for this epoch."""


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """The source gives the attempt up."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class GuestGivenAway:
    """What ran here was given away at this epoch and is let go of; 0: nothing ever was."""

    guest_epoch: int


@dataclass(frozen=True, slots=True)
class ForgetRequested:
    """The source recorded the outcome; it need not be remembered here."""

    key: AttemptKey


DestEvent = (
    OpenRequested
    | StreamBroken
    | IntakeFailed
    | StreamsJoined
    | PrepareRequested
    | ImageVerified
    | ImageRefused
    | GuestRestored
    | StateRecorded
    | StateNotRecorded
    | CommitRequested
    | GuestConfirmed
    | GuestStarted
    | GuestStartFailed
    | AbortRequested
    | ForgetRequested
    | GuestGivenAway
)
