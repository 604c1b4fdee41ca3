"""The page stream: one bidirectional gRPC call, chunks out, cumulative acknowledgements in.

Rule 1: messages are bytes already (identity serialiser); nothing here looks into them.
Rule 2: one thread, gRPC's own that takes the messages, reads the pages, at the moment when one more chunk may go,
        and takes the acknowledgements, when the window asks for them. Every further thread costs a hand-over of
        the interpreter per chunk: half a CPU-second per GiB for one that reads pages, a tenth of that for one
        that waits for acknowledgements, because gRPC wakes it at every message that was sent.
Rule 3: what is not acknowledged is bounded by WINDOW_CHUNKS; bandwidth, if limited, is kept chunk by chunk.
Rule 4: whatever ends the call before `close` is told once, through `stream_lost`, in one line.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc

from host.clock import now_ns
from migration.errors import RemoteProtocolError
from migration.events import PagesSent
from migration.pages import PAGE_BYTES
from migration.pb import migration_pb2
from source_node.page_reader import OutgoingChunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

METHOD = "/ballast.v1.Migration/Pages"
WINDOW_CHUNKS = 64  # 64 MiB at most between guest RAM and the destination's; it acknowledges every 16
# An error of the destination shows when the acknowledgements before it were taken: at 64 chunks that would be
# half a minute of a stream limited to 20 Mbit/s. Such a stream has far fewer than these on the way.
LIMITED_WINDOW_CHUNKS = 24
GRPC_PREFIX_BYTES = 5  # compressed flag and length before every gRPC message


class StreamListener(Protocol):
    """Who is told; from the stream's own threads."""

    def pages_sent(self, sent: PagesSent) -> None:
        """A batch was read; its last chunk is on its way to gRPC."""

    def all_acknowledged(self) -> None:
        """What `await_acknowledgements` asked for."""

    def stream_lost(self, reason: str) -> None:
        """The call ended, and not because we closed it; or pages could not be read."""


class PageStream:
    """One attempt's stream. `send`, `await_acknowledgements`, `close`, `cancel` by one thread."""

    def __init__(
        self, channel: grpc.Channel, listener: StreamListener, *, bytes_per_second: float | None
    ) -> None:
        self.sent_chunks = 0
        self.grpc_bytes = 0
        self.batch_sent = PagesSent(0, 0, 0)  # of the batch under way, for progress
        self._listener = listener
        self._bytes_per_second = bytes_per_second
        self._window_chunks = WINDOW_CHUNKS if bytes_per_second is None else LIMITED_WINDOW_CHUNKS
        self._paced_until_ns = 0
        self._changed = threading.Condition()
        self._stored_below = 0
        self._closing = False
        self._ended = False
        self._batches: queue.SimpleQueue[Iterable[OutgoingChunk] | OutgoingChunk | None] = queue.SimpleQueue()
        pages: grpc.StreamStreamMultiCallable[bytes, migration_pb2.ChunkAck] = channel.stream_stream(
            METHOD,
            request_serializer=None,
            response_deserializer=migration_pb2.ChunkAck.FromString,
        )
        self._call = pages(self._requests())
        if not self._call.add_callback(self._call_ended):
            self._call_ended()

    def send(self, batch: Iterable[OutgoingChunk]) -> None:
        """Read and send these chunks, lazily -> pages_sent."""
        self._batches.put(batch)

    def await_acknowledgements(self, marker: OutgoingChunk) -> None:
        """Send a chunk that asks for an acknowledgement, and wait for it -> all_acknowledged."""
        self._batches.put(marker)

    def close(self, timeout_s: float) -> bool:
        """Half-close and wait until the destination ended the call; False when it did not in time."""
        with self._changed:
            self._closing = True
        self._batches.put(None)
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, timeout_s)

    def cancel(self) -> None:
        """Give the call up. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._batches.put(None)
        self._call.cancel()
        with self._changed:
            self._changed.wait_for(lambda: self._ended)

    # -- gRPC's sending thread -----------------------------------------------------------------

    def _requests(self) -> Iterator[bytes]:
        while (batch := self._batches.get()) is not None:
            try:
                if isinstance(batch, OutgoingChunk):
                    yield from self._messages((batch,))
                    self._await_all()
                else:
                    yield from self._messages(batch)
            except Exception as error:
                # gRPC would only log it: the migration has to hear of it, and of the call's end no more.
                self._closing = True
                blamed = "page stream" if isinstance(error, RemoteProtocolError) else "pages cannot be read"
                self._listener.stream_lost(f"{blamed}: {type(error).__name__}: {error}")
                raise

    def _messages(self, batch: Iterable[OutgoingChunk]) -> Iterator[bytes]:
        """The messages of a batch.

        That it is read is told before its last chunk goes, so that the next batch is here when gRPC asks for it:
        a stream that waits for its next batch stands still.
        """
        data_pages = zero_pages = 0
        chunks = iter(batch)
        chunk = next(chunks, None)
        while chunk is not None:
            if not self._wait_for_turn(len(chunk.message)):
                return
            self.sent_chunks += 1
            self.grpc_bytes += len(chunk.message) + GRPC_PREFIX_BYTES
            data_pages += chunk.data_pages
            zero_pages += chunk.zero_pages
            self.batch_sent = PagesSent(data_pages, zero_pages, data_pages * PAGE_BYTES)
            message, chunk = chunk.message, next(chunks, None)
            if chunk is None and (data_pages or zero_pages):
                sent, self.batch_sent = self.batch_sent, PagesSent(0, 0, 0)  # from here on the ledger has it
                self._listener.pages_sent(sent)
            yield message

    def _wait_for_turn(self, message_bytes: int) -> bool:
        """Wait for room in the window and for the bandwidth's next slot; False when the stream is over."""
        if not self._acknowledged(self._window_chunks - 1):
            return False
        if self._bytes_per_second is not None:
            with self._changed:
                while not self._over and (ahead_ns := self._paced_until_ns - now_ns()) > 0:
                    self._changed.wait(ahead_ns / 1e9)
            cost_ns = int(message_bytes * 1e9 / self._bytes_per_second)
            self._paced_until_ns = max(self._paced_until_ns, now_ns()) + cost_ns
        return not self._over

    @property
    def _over(self) -> bool:
        return self._closing or self._ended

    def _await_all(self) -> None:
        if self._acknowledged(0):
            self._listener.all_acknowledged()

    def _acknowledged(self, outstanding_max: int) -> bool:
        """Take acknowledgements until no more chunks than this are without; False when the stream is over."""
        try:
            while not self._over and self.sent_chunks - self._stored_below > outstanding_max:
                ack = next(self._call, None)
                if ack is None:
                    return False
                if not self._stored_below <= ack.stored_below <= self.sent_chunks:
                    raise RemoteProtocolError(
                        "an acknowledgement that cannot be", stored=ack.stored_below, sent=self.sent_chunks
                    )
                self._stored_below = ack.stored_below
        except grpc.RpcError:
            # gRPC calls back when the connection has ended the call, too: an answer that is no message ends it here
            # alone, and would be noticed when keepalive gives the connection up.
            self._call_ended()
            return False
        return not self._over

    def _call_ended(self) -> None:
        """The call has a status. Told by gRPC, and by whoever finds out earlier."""
        with self._changed:
            expected, self._ended = self._closing or self._ended, True
            self._changed.notify_all()
        if expected:
            return
        if self._call.code() is grpc.StatusCode.OK:
            self._listener.stream_lost("the destination ended the page stream")
        else:
            self._listener.stream_lost(f"page stream: {one_line(self._call)}")


def one_line(error: grpc.RpcError | grpc.Call) -> str:
    """Status and details of a failed call, as one line for a person."""
    # Every RpcError of a call that was made is its grpc.Call too; the type stubs do not say so.
    call = cast("Any", error)
    return f"{call.code().name.lower().replace('_', ' ')}: {' '.join((call.details() or '').split())}"
