"""What a source may ask of a destination, field by field, before anything is done about it.

Rule 1: every field that a peer chooses has a bound here, whose breach is a RemoteProtocolError.
Rule 2: whatever is kept of a request (journal, history, memory) is bounded by these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migration.errors import RemoteProtocolError
from migration.identity import AttemptKey
from migration.pages import PAGE_BYTES
from migration.partition import STREAMS_MAX

if TYPE_CHECKING:
    from migration.pb import migration_pb2

INTEGRITY = ("full", "stream")
MEMORY_BYTES_MAX = 1 << 46  # 64 TiB: a size beyond it is a mistake, not a guest
MIGRATION_CHARACTERS_MAX = 200  # a name in the journal and in every line of the history
EPOCH_MAX = 1 << 62  # a guest is not handed over so often; the journal's integers have 63 bits
LINK_TIMEOUT_MS_MAX = 24 * 3600 * 1000  # what was received occupies this host's memory all the while
REASON_CHARACTERS_MAX = 300  # a peer's reason is recorded: one line that a person reads
VCPU_STATE_BYTES_MAX = 16 * 1024  # DESIGN 3.10; more would not fit the agent's link either
RING_BASES_MAX = 16  # a balloon has five rings


def key_of(message: migration_pb2.AttemptId) -> AttemptKey:
    """The key of a call; RemoteProtocolError when it names nothing, or what nobody could have named so."""
    name = message.migration
    if not name or not message.attempt:
        raise RemoteProtocolError("a call without an attempt id")
    if len(name) > MIGRATION_CHARACTERS_MAX or not name.isprintable():
        raise RemoteProtocolError("no migration is called so", characters=len(name))
    if message.guest_epoch > EPOCH_MAX:
        raise RemoteProtocolError("no guest has such an epoch", guest_epoch=message.guest_epoch)
    return AttemptKey(name, message.attempt, message.guest_epoch)


def check_open(request: migration_pb2.OpenRequest) -> None:
    """Whether such an attempt can be at all. Raises RemoteProtocolError."""
    if request.page_bytes != PAGE_BYTES:
        raise RemoteProtocolError("page size differs", ours=PAGE_BYTES, theirs=request.page_bytes)
    size = request.memory_bytes
    if not 0 < size <= MEMORY_BYTES_MAX or size % PAGE_BYTES:
        raise RemoteProtocolError("no guest has such a memory", memory_bytes=size)
    if request.integrity not in INTEGRITY:
        raise RemoteProtocolError("unknown integrity", integrity=line(request.integrity))
    if request.streams > STREAMS_MAX:
        raise RemoteProtocolError("too many streams", streams=request.streams, streams_max=STREAMS_MAX)
    if request.link_timeout_ms > LINK_TIMEOUT_MS_MAX:
        raise RemoteProtocolError(
            "no host keeps memory for a lost link so long",
            link_timeout_ms=request.link_timeout_ms,
            maximum=LINK_TIMEOUT_MS_MAX,
        )


def check_prepare(request: migration_pb2.PrepareRequest) -> None:
    """Whether such an image can be at all. Raises RemoteProtocolError."""
    if len(request.vcpu_state) > VCPU_STATE_BYTES_MAX:
        raise RemoteProtocolError("vCPU state too large", size=len(request.vcpu_state))
    if len(request.device.ring_bases) > RING_BASES_MAX or any(
        base > 0xFFFF for base in request.device.ring_bases
    ):
        raise RemoteProtocolError("no balloon has such rings", rings=len(request.device.ring_bases))


def line(words: str) -> str:
    """A peer's words, as one bounded line."""
    return " ".join(words.split())[:REASON_CHARACTERS_MAX]
