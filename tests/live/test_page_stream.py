"""The page stream against destinations of a few lines, over real connections."""

import queue
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from migration.pb.migration_pb2 import ChunkAck
from source_node.page_reader import OutgoingChunk
from source_node.page_stream import LIMITED_WINDOW_CHUNKS, WINDOW_CHUNKS, PageStream

CHUNK = OutgoingChunk(message=b"x" * 100, data_pages=1, zero_pages=0)
MARKER = OutgoingChunk(message=b"marker", data_pages=0, zero_pages=0)
PATIENCE_S = 20.0


class Told:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def pages_sent(self, sent):
        self.queue.put(("sent", sent.data_pages))

    def all_acknowledged(self):
        self.queue.put(("acknowledged",))

    def stream_lost(self, reason):
        self.queue.put(("lost", reason))

    def next(self):
        return self.queue.get(timeout=PATIENCE_S)


@contextmanager
def stream_to(handler, *, bytes_per_second=None):
    """A stream whose chunks `handler(messages, context)` takes; and what it told."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    pages = grpc.stream_stream_rpc_method_handler(handler, response_serializer=ChunkAck.SerializeToString)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("ballast.v1.Migration", {"Pages": pages}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    told = Told()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = PageStream(channel, told, bytes_per_second=bytes_per_second)
        yield stream, told
        stream.cancel()
    server.stop(None).wait()


def acknowledging_every(chunks):
    def handler(messages, _context):
        for number, message in enumerate(messages, start=1):
            if number % chunks == 0 or message == MARKER.message:
                yield ChunkAck(stored_below=number)

    return handler


def test_batches_are_told_and_acknowledged_and_the_stream_closes() -> None:
    with stream_to(acknowledging_every(16)) as (stream, told):
        for _ in range(3):
            stream.send([CHUNK] * 100)
            assert told.next() == ("sent", 100)
        stream.await_acknowledgements(MARKER)
        assert told.next() == ("acknowledged",)
        assert stream.close(PATIENCE_S)
        assert told.queue.empty()
    assert told.queue.empty(), "an end that we asked for is no loss"


def test_no_more_than_the_window_goes_unacknowledged() -> None:
    taken = queue.SimpleQueue()

    def handler(messages, _context):
        for _ in messages:
            taken.put(None)
        yield from ()

    with stream_to(handler) as (stream, told):
        stream.send([CHUNK] * (WINDOW_CHUNKS + 1))
        for _ in range(WINDOW_CHUNKS):
            taken.get(timeout=PATIENCE_S)
        # That the last one does not come cannot be waited for; that it was not counted as sent can be seen.
        assert stream.sent_chunks == WINDOW_CHUNKS
        assert told.queue.empty()


@pytest.mark.parametrize("bytes_per_second", [None, 1e6])
def test_a_refusal_is_told_once_although_acknowledgements_were_not_taken(bytes_per_second) -> None:
    """gRPC shows a status only when the messages before it were taken."""

    def handler(messages, context):
        for number, _ in enumerate(messages, start=1):
            if number <= 16:
                yield ChunkAck(stored_below=number)
            else:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad\npage chunk")

    with stream_to(handler, bytes_per_second=bytes_per_second) as (stream, told):
        stream.send(CHUNK for _ in range(10_000))
        assert told.next() == ("lost", "page stream: invalid argument: bad page chunk")
        if bytes_per_second is not None:
            assert stream.sent_chunks <= 16 + LIMITED_WINDOW_CHUNKS
        assert told.queue.empty()
    assert told.queue.empty()


def test_a_destination_that_ends_the_stream_is_a_loss() -> None:
    def handler(messages, _context):
        next(messages)
        yield ChunkAck(stored_below=1)

    with stream_to(handler) as (stream, told):
        stream.send(CHUNK for _ in range(10_000))
        assert told.next() == ("lost", "the destination ended the page stream")


def test_a_destination_that_is_not_there_is_a_loss() -> None:
    told = Told()
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stream = PageStream(channel, told, bytes_per_second=None)
        kind, reason = told.next()
        assert kind == "lost"
        assert reason.startswith("page stream: unavailable")
        stream.cancel()


def test_pages_that_cannot_be_read_are_told_once() -> None:
    def broken():
        yield CHUNK
        raise OSError("no such page")

    with stream_to(acknowledging_every(16)) as (stream, told):
        stream.send(broken())
        assert told.next() == ("lost", "pages cannot be read: OSError: no such page")
    assert told.queue.empty()


@pytest.mark.parametrize("bytes_per_second", [None, 1.0])
def test_cancel_ends_a_stream_that_waits(bytes_per_second) -> None:
    """For acknowledgements that do not come, or for the bandwidth's next slot."""

    def handler(messages, _context):
        for _ in messages:
            pass
        yield from ()

    with stream_to(handler, bytes_per_second=bytes_per_second) as (stream, told):
        stream.send([CHUNK] * (WINDOW_CHUNKS + 1))
        stream.cancel()
        stream.cancel()
    while not told.queue.empty():
        assert told.next()[0] == "sent"
