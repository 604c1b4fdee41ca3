"""One page stream of an attempt: one bidirectional gRPC call, chunks out, cumulative acknowledgements in.

Rule 1: messages are bytes already (identity serialiser); nothing here looks into them.
Rule 2: one thread, gRPC's own that takes the messages, reads the pages, at the moment when one more chunk may go,
        and takes the acknowledgements, when the window asks for them. Every further thread costs a hand-over of
        the interpreter per chunk: half a CPU-second per GiB for one that reads pages, a tenth of that for one
        that waits for acknowledgements, because gRPC wakes it at every message that was sent.
Rule 3: of a chunk that is not acknowledged its page numbers are kept, never its data: it may have to be read again.
Rule 4: a lost call is over for good: what its thread still does changes nothing (`_live`).
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc
import numpy as np

from host.clock import now_ns
from migration.errors import RemoteProtocolError
from migration.pb import migration_pb2
from source_node.page_reader import ChunkNumbers, OutgoingChunk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migration.pages import U64Array
    from source_node.pacer import Pacer
    from source_node.packer import Packer
    from source_node.page_reader import PageReader

METHOD = "/ballast.v1.Migration/Pages"
GRPC_PREFIX_BYTES = 5  # compressed flag and length before every gRPC message
DETAILS_CHARACTERS_MAX = 300  # a peer's words in ours: one line that a person reads
REPAIR_PAGES = 2048  # pages sent again go in pieces of a batch's size
# The connection's end, as apart from an answer of the destination: only this may come back.
LINK_CODES = frozenset({grpc.StatusCode.UNAVAILABLE})


@dataclass(eq=False, slots=True)
class Part:
    """The pages of a batch that go by one stream; `is_repair`: they were counted when they were sent first."""

    round_index: int
    pfns: U64Array
    is_repair: bool = False
    data_pages: int = 0
    zero_pages: int = 0
    read: list[U64Array] = field(default_factory=list)  # what is in chunks already


@dataclass(frozen=True, eq=False, slots=True)
class Marker:
    """Asks for an acknowledgement of everything."""

    round_index: int


@dataclass(eq=False, slots=True)
class OpenCall:
    """One gRPC call of a stream; a stream has another one after a loss."""

    rpc: Any = None
    ended: bool = False


class LaneOwner(Protocol):
    """Who is told what becomes of one stream; from the stream's thread or gRPC's."""

    @property
    def over(self) -> bool:
        """Nothing is to be sent any more."""

    def part_read(self, part: Part) -> None:
        """All of a part is in chunks; the last of them goes next."""

    def lane_acknowledged(self) -> None:
        """What a marker asked for."""

    def lane_lost(self, reason: str, *, refused: bool) -> None:
        """The call ended, and not because we closed it; or pages could not be read."""


class PageLane:
    """Thread-safe. Opened by `open`, and again after `rewind`."""

    def __init__(
        self,
        index: int,
        channel: grpc.Channel,
        owner: LaneOwner,
        reader: PageReader,
        *,
        pacer: Pacer | None,
        packer: Packer | None,
        chunk_pages: int,
        window_chunks: int,
    ) -> None:
        self.messages = 0
        self.grpc_bytes = 0
        self.resent_pages = 0
        self.sent = 0  # chunks with a lower sequence were given to gRPC
        self._numbers = ChunkNumbers(index, chunk_pages=chunk_pages, packer=packer)
        self._owner = owner
        self._reader = reader
        self._pacer = pacer
        self._window_chunks = window_chunks
        self._stored_below = 0
        self._round_index = 0
        # bounded: by WINDOW_CHUNKS; the pages of chunks from stored_below on
        self._kept: deque[U64Array] = deque()
        # bounded: one batch, one marker, and what one window repairs
        self._works: deque[Part | Marker] = deque()
        self._changed = threading.Condition()
        self._reading = threading.Lock()  # held while a chunk is made, so that a rewind comes between two
        self._call = OpenCall(ended=True)
        self._pages: grpc.StreamStreamMultiCallable[bytes, migration_pb2.ChunkAck] = channel.stream_stream(
            METHOD,
            request_serializer=None,
            response_deserializer=migration_pb2.ChunkAck.FromString,
        )

    # -- the attempt's threads -----------------------------------------------------------------

    def open(self) -> None:
        """Make the call."""
        with self._changed:
            call = self._call = OpenCall()
            call.rpc = self._pages(self._requests(call))
        if not call.rpc.add_callback(lambda: self._call_ended(call)):
            self._call_ended(call)

    def put(self, work: Part | Marker) -> None:
        """To be done after what was put before."""
        with self._changed:
            self._works.append(work)
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anything is unsent or unacknowledged."""
        return bool(self._works or self._kept)

    def wake(self) -> None:
        """Look whether it is over."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self) -> None:
        """End the call."""
        if self._call.rpc is not None:
            self._call.rpc.cancel()

    def wait_ended(self, timeout_s: float | None) -> bool:
        """Whether the call has its status, at latest after this time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._call.ended, timeout_s)

    def rewind(self, stored_below: int) -> U64Array:
        """After a loss: number on from `stored_below`; what was sent beyond goes again, first, when opened.

        Returns:
            The pages that are sent again, ascending.

        Raises:
            RemoteProtocolError: the destination cannot have stored that.
        """
        with self._reading, self._changed:
            self._call = OpenCall(ended=True)  # the lost call's thread changes nothing from here on
            self._acknowledge(stored_below)
            lost = np.unique(np.concatenate([_NO_PFNS, *self._kept]))
            self._kept.clear()
            self._numbers.next_sequence = self.sent = stored_below
            first = self._works[0] if self._works else None
            if isinstance(first, Part):
                read = np.concatenate([_NO_PFNS, *first.read])
                first.pfns = np.setdiff1d(first.pfns, read, assume_unique=True)
                first.read.clear()
            for start in reversed(range(0, len(lost), REPAIR_PAGES)):
                pfns = lost[start : start + REPAIR_PAGES]
                self._works.appendleft(Part(self._round_index, pfns, is_repair=True))
            self.resent_pages += len(lost)
            if self._numbers.packer is not None:
                self._numbers.packer.forget(lost)
            return lost

    # -- gRPC's sending thread -----------------------------------------------------------------

    def _live(self, call: OpenCall) -> bool:
        return call is self._call and not call.ended and not self._owner.over

    def _requests(self, call: OpenCall) -> Iterator[bytes]:
        while (work := self._next_work(call)) is not None:
            try:
                if isinstance(work, Marker):
                    yield from self._mark(call, work)
                else:
                    yield from self._send(call, work)
            except Exception as error:
                # gRPC would only log it: the migration has to hear of it, and of the call's end no more.
                blamed = "page stream" if isinstance(error, RemoteProtocolError) else "pages cannot be read"
                self._owner.lane_lost(f"{blamed}: {type(error).__name__}: {error}", refused=True)
                raise

    def _next_work(self, call: OpenCall) -> Part | Marker | None:
        """What stands first; it stays there until it is done."""
        with self._changed:
            # ends: work, or the call's end
            self._changed.wait_for(lambda: self._works or not self._live(call))
            return self._works[0] if self._live(call) else None

    def _done(self, work: Part | Marker) -> None:
        with self._changed:
            taken = self._works.popleft()
        assert taken is work, "works are done in their order"

    def _send(self, call: OpenCall, part: Part) -> Iterator[bytes]:
        """The messages of a part.

        That it is read is told before its last chunk goes, so that the next batch is here when gRPC asks for it:
        a stream that waits for its next batch stands still.
        """
        chunks = self._reader.chunks_of(self._numbers, part.round_index, part.pfns)
        chunk = self._next_chunk(call, chunks, part)
        while chunk is not None:
            if not self._wait_for_turn(call, len(chunk.message)):
                return
            message, chunk = chunk.message, self._next_chunk(call, chunks, part)
            if not self._count(call, message):
                return
            yield message

    def _next_chunk(
        self, call: OpenCall, chunks: Iterator[OutgoingChunk], part: Part
    ) -> OutgoingChunk | None:
        """Make the part's next chunk, and book it; None when there is none, or the call is over."""
        with self._reading:
            if not self._live(call):
                return None
            self._round_index = part.round_index
            chunk = next(chunks, None)
            if chunk is None:
                self._done(part)
                if not part.is_repair:
                    self._owner.part_read(part)
                return None
            self._kept.append(chunk.pfns)
            part.read.append(chunk.pfns)
            part.data_pages += chunk.data_pages
            part.zero_pages += chunk.zero_pages
            return chunk

    def _mark(self, call: OpenCall, marker: Marker) -> Iterator[bytes]:
        if not self._wait_for_turn(call, 0):
            return
        with self._reading:
            if not self._live(call):
                return
            message = self._reader.marker(self._numbers, marker.round_index).message
            self._kept.append(_NO_PFNS)
        if not self._count(call, message):
            return
        yield message
        if self._acknowledged(call, 0):
            with self._reading:
                if not self._live(call):
                    return
                self._done(marker)
            self._owner.lane_acknowledged()

    def _count(self, call: OpenCall, message: bytes) -> bool:
        """Book a message that goes now; False when the call is over: a rewind has seen to it that it goes again."""
        with self._reading:
            if not self._live(call):
                return False
            self.sent += 1
            self.messages += 1
            self.grpc_bytes += len(message) + GRPC_PREFIX_BYTES
            return True

    def _wait_for_turn(self, call: OpenCall, message_bytes: int) -> bool:
        """Wait for room in the window and for the bandwidth's next slot; False when the call is over."""
        if not self._acknowledged(call, self._window_chunks - 1):
            return False
        if self._pacer is not None:
            start_ns = self._pacer.reserve(message_bytes + GRPC_PREFIX_BYTES)
            with self._changed:
                while self._live(call) and (ahead_ns := start_ns - now_ns()) > 0:
                    self._changed.wait(ahead_ns / 1e9)
        return self._live(call)

    def _acknowledged(self, call: OpenCall, outstanding_max: int) -> bool:
        """Take acknowledgements until no more chunks than this are without; False when the call is over."""
        try:
            while self._live(call) and self.sent - self._stored_below > outstanding_max:
                ack = next(call.rpc, None)
                if ack is None:
                    return False
                with self._reading:
                    if self._live(call):
                        self._acknowledge(ack.stored_below)
        except grpc.RpcError:
            # gRPC calls back when the connection has ended the call, too: an answer that is no message ends it here
            # alone, and would be noticed when keepalive gives the connection up.
            self._call_ended(call)
            return False
        return self._live(call)

    def _acknowledge(self, stored_below: int) -> None:
        if not self._stored_below <= stored_below <= self.sent:
            raise RemoteProtocolError(
                "an acknowledgement that cannot be", stored=stored_below, sent=self.sent
            )
        for _ in range(stored_below - self._stored_below):
            self._kept.popleft()
        self._stored_below = stored_below

    def _call_ended(self, call: OpenCall) -> None:
        """The call has a status. Told by gRPC, and by whoever finds out earlier."""
        with self._changed:
            if call.ended:
                return
            call.ended = True
            self._changed.notify_all()
            if call is not self._call:
                return
        code = call.rpc.code()
        if code is grpc.StatusCode.OK:
            self._owner.lane_lost("the destination ended the page stream", refused=True)
        else:
            self._owner.lane_lost(f"page stream: {one_line(call.rpc)}", refused=code not in LINK_CODES)


def one_line(error: grpc.RpcError | grpc.Call) -> str:
    """Status and details of a failed call, as one line for a person."""
    # Every RpcError of a call that was made is its grpc.Call too; the type stubs do not say so.
    call = cast("Any", error)
    words = " ".join((call.details() or "").split())[:DETAILS_CHARACTERS_MAX]
    return f"{call.code().name.lower().replace('_', ' ')}: {words}"


_NO_PFNS: U64Array = np.empty(0, np.uint64)
