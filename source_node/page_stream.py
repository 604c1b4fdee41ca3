"""The page stream: one bidirectional gRPC call, chunks out, cumulative acknowledgements in.

Rule 1: messages are bytes already (identity serialiser); nothing here looks into them.
Rule 2: what is not acknowledged is bounded by WINDOW_CHUNKS; `has_room` says whether one more may go.
Rule 3: whatever ends the call before `close` is told once, through `on_lost`, in one line.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, cast

import grpc

from migration.pb import migration_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from source_node.page_reader import OutgoingChunk

METHOD = "/ballast.v1.Migration/Pages"
WINDOW_CHUNKS = 64  # 64 MiB at most between the reader and the destination's RAM; it acknowledges every 16
GRPC_PREFIX_BYTES = 5  # compressed flag and length before every gRPC message


class PageStream:
    """One attempt's stream. `send`, `close` by one thread; callbacks come from the stream's own thread."""

    def __init__(
        self, channel: grpc.Channel, *, on_ack: Callable[[], None], on_lost: Callable[[str], None]
    ) -> None:
        self.sent_chunks = 0
        self.grpc_bytes = 0
        self._on_ack = on_ack
        self._on_lost = on_lost
        self._stored_below = 0
        self._ended = threading.Event()
        self._closing = False
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        pages: grpc.StreamStreamMultiCallable[bytes, migration_pb2.ChunkAck] = channel.stream_stream(
            METHOD,
            request_serializer=None,
            response_deserializer=migration_pb2.ChunkAck.FromString,
        )
        self._call = pages(self._requests())
        self._thread = threading.Thread(target=self._read_acks, name="page-acks", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether one more chunk may be sent now."""
        return self.sent_chunks - self._stored_below < WINDOW_CHUNKS

    @property
    def all_acknowledged(self) -> bool:
        """Whether everything sent is stored at the destination."""
        return self._stored_below == self.sent_chunks

    def send(self, chunk: OutgoingChunk) -> None:
        """Hand one chunk to the call."""
        self.sent_chunks += 1
        self.grpc_bytes += len(chunk.message) + GRPC_PREFIX_BYTES
        self._outgoing.put(chunk.message)

    def close(self, timeout_s: float) -> bool:
        """Half-close and wait until the destination ended the call; False when it did not in time."""
        self._closing = True
        self._outgoing.put(None)
        return self._ended.wait(timeout_s)

    def cancel(self) -> None:
        """Give the call up. Idempotent."""
        self._closing = True
        self._outgoing.put(None)
        self._call.cancel()
        self._thread.join()

    def _requests(self) -> Iterator[bytes]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read_acks(self) -> None:
        try:
            for ack in self._call:
                self._stored_below = ack.stored_below
                self._on_ack()
            if not self._closing:
                self._on_lost("the destination ended the page stream")
        except grpc.RpcError as error:
            if not self._closing:
                self._on_lost(f"page stream: {one_line(error)}")
        finally:
            self._ended.set()


def one_line(error: grpc.RpcError) -> str:
    """Status and details of a failed call, as one line for a person."""
    # Every RpcError of a call that was made is its grpc.Call too; the type stubs do not say so.
    call = cast("Any", error)
    return f"{call.code().name.lower().replace('_', ' ')}: {' '.join((call.details() or '').split())}"
