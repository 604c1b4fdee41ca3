"""Orders that a migration machine gives to its shell. Imperatives, frozen, one closed union per side.

Rule 1: a shell carries commands out in the order given, and answers with the event named in the command.
Rule 2: a command that fails is answered by HostFailed, LinkLost or PeerLost (source), or ImageRefused
        (destination).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from migration.events import Answer, Recorded, Timer
from migration.identity import AttemptKey
from migration.pages import U64Array

# --- source ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordState:
    """Write this state durably -> StateRecorded."""

    key: AttemptKey
    state: Recorded
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OpenDestination:
    """Ask for zeroed memory and open the page stream -> DestinationOpened, LinkLost or PeerLost."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class ResumeDestination:
    """Connect again and ask for this very attempt -> DestinationResumed, LinkLost or PeerLost."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class ResumeStreams:
    """Open the page streams again, each behind what the destination has stored -> StreamsResumed."""

    stored_below: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ThrottleGuest:
    """Have the vCPU sleep this share of its time; 0 lifts the throttle. No answer."""

    percent: int


@dataclass(frozen=True, slots=True)
class StartTracking:
    """Arm the dirty tracker over all of RAM -> TrackingStarted."""


@dataclass(frozen=True, slots=True)
class Harvest:
    """Read and re-arm the tracker; add the device's own stores -> Harvested."""


@dataclass(frozen=True, slots=True)
class OpenHints:
    """Issue a fresh command id to the guest -> HintsOpened, then HintsReported as they come."""


@dataclass(frozen=True, slots=True)
class CloseHints:
    """Stop the report, drain the queue -> HintsClosed."""


@dataclass(frozen=True, slots=True)
class EndHints:
    """Tell the guest DONE: it may have its held pages back. No answer."""


@dataclass(frozen=True, slots=True)
class ArmTimer:
    """Fire TimerFired(timer) after `delay_ms`."""

    timer: Timer
    delay_ms: int


@dataclass(frozen=True, slots=True)
class DisarmTimer:
    """Forget the timer."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class SendPages:
    """Read and send these pages, ascending -> PagesSent."""

    round_index: int
    pfns: U64Array


@dataclass(frozen=True, slots=True)
class AwaitAcknowledgements:
    """Tell when everything sent is stored -> AllAcknowledged."""


@dataclass(frozen=True, slots=True)
class PauseGuest:
    """Stop the guest's threads, then its rings -> GuestPaused."""


@dataclass(frozen=True, slots=True)
class SaveGuest:
    """Take vCPU and device state, end the page stream, compute the digest -> GuestSaved.

    Of a guest that stays (`rehearsal`) there is no vCPU state to take.
    """

    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class SendPrepare:
    """-> PrepareAnswered, LinkLost or PeerLost. May be ordered again: the destination answers the same."""

    key: AttemptKey
    image_digest: int
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class SendCommit:
    """-> CommitAnswered, LinkLost or PeerLost."""

    key: AttemptKey
    image_digest: int


@dataclass(frozen=True, slots=True)
class KeepEvidence:
    """Write down what a judge will ask for about a rehearsal, before its traces are gone.

    Source: hashes of the paused guest's RAM, from scratch, and its frame table -> EvidenceKept. Destination:
    hashes of what it read back; no answer.
    """


@dataclass(frozen=True, slots=True)
class ResumeGuest:
    """Let the guest run on here -> GuestResumed."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class FreezeGuest:
    """The guest was given away: never run it here again. No answer."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class AbortDestination:
    """Tell the destination, as far as it can be reached. No answer."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class ForgetDestination:
    """The outcome is recorded here: the destination may forget the attempt. No answer."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Note:
    """One line for the history."""

    name: str
    fields: dict[str, object]


class Cause(Enum):
    """What made an attempt turn back: after a lost link or destination another attempt may go better."""

    NONE = ""
    REQUEST = "request"
    LIMIT = "limit"
    LINK = "link"
    DESTINATION = "destination"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class EndMigration:
    """The attempt is over; nothing follows."""

    outcome: str  # completed | rehearsal | cancelled | failed
    reason: str
    cause: Cause = Cause.NONE


SourceCommand = (
    RecordState
    | OpenDestination
    | ResumeDestination
    | ResumeStreams
    | ThrottleGuest
    | StartTracking
    | Harvest
    | OpenHints
    | CloseHints
    | EndHints
    | ArmTimer
    | DisarmTimer
    | SendPages
    | AwaitAcknowledgements
    | PauseGuest
    | SaveGuest
    | SendPrepare
    | SendCommit
    | KeepEvidence
    | ResumeGuest
    | FreezeGuest
    | AbortDestination
    | ForgetDestination
    | Note
    | EndMigration
)

# --- destination ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReserveMemory:
    """Have RAM that is known to be zero, under a fresh incarnation. No answer."""

    key: AttemptKey
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class JoinStreams:
    """Cut every open page stream and wait for what it is storing -> StreamsJoined | IntakeFailed."""


@dataclass(frozen=True, slots=True)
class VerifyImage:
    """Join every writer, compare counts, digest and (integrity full) RAM -> ImageVerified | ImageRefused."""

    image_digest: int
    chunks: int


@dataclass(frozen=True, slots=True)
class RestoreGuest:
    """Hand RAM and state to the standby agent -> GuestRestored | ImageRefused."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class ConfirmGuest:
    """Ask the standby agent whether it still holds the image -> GuestConfirmed | ImageRefused."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class RunGuest:
    """Let the restored guest run, take its balloon over, tell it DONE -> GuestStarted | GuestStartFailed.

    May be ordered again for the same attempt.
    """

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class DiscardImage:
    """Join every writer, drop the agent's image if it has one, and leave RAM known zero. No answer."""

    reason: str


@dataclass(frozen=True, slots=True)
class ForgetAttempt:
    """Remove the attempt from the journal. No answer."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the call that is being handled."""

    answer: Answer
    reason: str = ""


DestCommand = (
    RecordState
    | ReserveMemory
    | JoinStreams
    | VerifyImage
    | KeepEvidence
    | RestoreGuest
    | ConfirmGuest
    | RunGuest
    | DiscardImage
    | ForgetAttempt
    | Reply
    | Note
)
