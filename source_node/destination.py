"""The destination as the source sees it: one channel, the control calls, the page stream.

Rule 1: every call has a deadline. Open, Prepare and Commit answer through a callback, so that the migration
        thread stays free to be cancelled while the destination works.
Rule 2: a lost connection is LinkLost: it may come back; a refusal is PeerLost, and so is an address where nobody
        listens when it is called first: what was not there is not lost. Only replies are answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from host.tls import PLAIN, Trust
from migration.codec import INCARNATION_BYTES_MAX
from migration.events import (
    Answer,
    CommitAnswered,
    DestinationOpened,
    DestinationResumed,
    LinkLost,
    PeerLost,
    PrepareAnswered,
    SourceEvent,
)
from migration.pages import PAGE_BYTES
from migration.pb import migration_pb2, migration_pb2_grpc
from source_node.page_stream import PageStream, StreamListener, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.identity import AttemptKey
    from source_node.packer import PackingOrder
    from source_node.page_reader import PageReader

OPEN_TIMEOUT_S = 10.0  # reserving is bookkeeping; zeroing a failed attempt's 8 GiB takes about a second
PREPARE_TIMEOUT_S = 120.0  # integrity full hashes all of RAM, several GiB a second
COMMIT_TIMEOUT_S = 10.0  # then it is asked again
FAREWELL_TIMEOUT_S = 5.0  # Abort and Forget: best effort
KEEPALIVE_MS = 5_000  # a destination that is gone without a word is noticed within twice this
MESSAGE_BYTES_MAX = 8 << 20  # as the other end has it: a chunk is little over 4 MiB
REASON_CHARACTERS_MAX = 300  # a peer's reason becomes ours: one line that a person reads

# The connection's end, or a silence, as apart from an answer: the link may come back.
LINK_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
# How gRPC words that it could not connect, so that nobody has heard of the call; its code is that of a connection
# that broke.
NOT_CONNECTED = ("failed to connect to all addresses", "errors resolving")
# And that this was an answer: no such name, nobody listens, who listens is no gRPC server or not who was meant. The
# rest is silence, which may be a slow link: a lost link, as whatever is worded otherwise some day, and waited for.
SAID_NO = (
    "errors resolving", "Connection refused", "Failed parsing HTTP/2", "Verification Check failed",
    "TSI_PROTOCOL_FAILURE",
)  # fmt: skip

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),  # unlimited: the stream may be silent while the guest hints
    ("grpc.initial_reconnect_backoff_ms", 200),  # the guest may stand still until we are through
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # a retried call would be a second message; the machine decides
    ("grpc.use_local_subchannel_pool", 1),  # our own connection, so that its bytes can be told apart
]


def id_message(key: AttemptKey) -> migration_pb2.AttemptId:
    """The key on the wire."""
    return migration_pb2.AttemptId(migration=key.migration, attempt=key.attempt, guest_epoch=key.guest_epoch)


class Destination:
    """One attempt's peer. Events go to `post`, from gRPC's threads."""

    def __init__(
        self,
        address: str,
        key: AttemptKey,
        post: Callable[[SourceEvent], None],
        *,
        server_name: str = "",
        trust: Trust = PLAIN,
    ) -> None:
        self.address = address
        self.incarnation = ""
        self.control_bytes = 0  # of control messages sent, with their gRPC prefix
        self.verify_ns = 0
        self.resume_ns = 0
        self._opening = migration_pb2.OpenRequest()  # as it was asked
        self._open_unanswered = False
        self._never_up = False  # so that nothing of the attempt is there
        self._key = key
        self._post = post
        self.encrypted = trust.encrypts
        self._channel = trust.channel(address, server_name, CHANNEL_OPTIONS)
        self._stub = migration_pb2_grpc.MigrationStub(self._channel)

    def open(self, memory_bytes: int, integrity: str, streams: int, link_timeout_ms: int) -> None:
        """-> DestinationOpened, LinkLost or PeerLost. May be called again: the destination answers the same."""
        request = migration_pb2.OpenRequest(
            id=id_message(self._key),
            memory_bytes=memory_bytes,
            page_bytes=PAGE_BYTES,
            integrity=integrity,
            streams=streams,
            link_timeout_ms=link_timeout_ms,
        )
        first = not self._open_unanswered
        self._opening = request
        self._open_unanswered = True
        self._call(self._stub.Open, request, OPEN_TIMEOUT_S, self._opened, first=first)

    def resume(self) -> None:
        """Ask for the attempt that was opened before -> DestinationResumed, LinkLost or PeerLost."""
        request = migration_pb2.OpenRequest()
        request.CopyFrom(self._opening)
        request.resume = True
        self._call(self._stub.Open, request, OPEN_TIMEOUT_S, self._resumed)

    def page_stream(
        self,
        listener: StreamListener,
        reader: PageReader,
        *,
        streams: int,
        bytes_per_second: float | None,
        packing: PackingOrder,
    ) -> PageStream:
        """The streams of this attempt."""
        return PageStream(
            self._channel,
            listener,
            reader,
            streams=streams,
            bytes_per_second=bytes_per_second,
            packing=packing,
        )

    def prepare(self, request: migration_pb2.PrepareRequest) -> None:
        """-> PrepareAnswered, LinkLost or PeerLost."""
        self._call(self._stub.Prepare, request, PREPARE_TIMEOUT_S, self._prepared)

    def commit(self, image_digest: int) -> None:
        """-> CommitAnswered, LinkLost or PeerLost."""
        request = migration_pb2.CommitRequest(id=id_message(self._key), image_digest=image_digest)
        self._call(self._stub.Commit, request, COMMIT_TIMEOUT_S, self._committed)

    def abort(self, reason: str) -> str:
        """Tell it, as far as it can be reached; returns what went wrong, or "".

        An Open that is still on its way may come there after this: then it is to be told once more. Where there
        never was a connection, nobody has anything to hear.
        """
        if self._never_up:
            return ""
        request = migration_pb2.AbortRequest(id=id_message(self._key), reason=reason)
        overtaking = self._open_unanswered
        if problem := self._farewell(self._stub.Abort, request):
            return problem
        return "it may have come before the Open that was not answered yet" if overtaking else ""

    def forget(self) -> str:
        """The outcome is recorded here; returns what went wrong, or ""."""
        return self._farewell(self._stub.Forget, migration_pb2.ForgetRequest(id=id_message(self._key)))

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    # -- answers -------------------------------------------------------------------------------

    def _opened(self, reply: migration_pb2.OpenReply) -> SourceEvent:
        if not 0 < len(reply.incarnation.encode()) <= INCARNATION_BYTES_MAX:
            return PeerLost("the destination answered Open without a name of its memory")
        self.incarnation = reply.incarnation
        return DestinationOpened(reply.incarnation)

    def _resumed(self, reply: migration_pb2.OpenReply) -> SourceEvent:
        if reply.incarnation != self.incarnation:
            return PeerLost("the destination goes on with another memory than the one that was sent to")
        if len(reply.stored_below) != self._opening.streams:
            return PeerLost(
                f"the destination resumed {len(reply.stored_below)} streams of {self._opening.streams}"
            )
        return DestinationResumed(tuple(reply.stored_below))

    def _prepared(self, reply: migration_pb2.PrepareReply) -> SourceEvent:
        self.verify_ns = reply.verify_ns
        return PrepareAnswered(_answer(reply.decision), _words(reply.reason))

    def _committed(self, reply: migration_pb2.CommitReply) -> SourceEvent:
        self.resume_ns = reply.resume_ns
        return CommitAnswered(_answer(reply.decision), _words(reply.reason))

    def _call(self, method, request, timeout_s, event_of, *, first=False) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self.control_bytes += request.ByteSize() + 5

        def done(future: Any) -> None:
            try:
                event: SourceEvent = event_of(future.result())  # ends: it is done
            except grpc.RpcError as error:
                name = type(request).__name__.removesuffix("Request")
                words = error.details() or ""
                self._never_up = first and words.startswith(NOT_CONNECTED)
                refused = self._never_up and any(answer in words for answer in SAID_NO)
                lost = LinkLost if future.code() in LINK_CODES and not refused else PeerLost
                event = lost(f"{name} to {self.address}: {one_line(error)}")
            if event_of == self._opened and not isinstance(event, LinkLost):
                self._open_unanswered = False
            self._post(event)

        method.future(request, timeout=timeout_s).add_done_callback(done)

    def _farewell(self, method, request) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self.control_bytes += request.ByteSize() + 5
        try:
            method(request, timeout=FAREWELL_TIMEOUT_S)
        except grpc.RpcError as error:
            return one_line(error)
        return ""


def _answer(decision: int) -> Answer:
    # The two enums have the same numbers on purpose; a number that we do not know is no answer.
    return Answer(decision) if decision in {answer.value for answer in Answer} else Answer.UNKNOWN


def _words(reason: str) -> str:
    return " ".join(reason.split())[:REASON_CHARACTERS_MAX]
