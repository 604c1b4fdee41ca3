"""The page streams against destinations of a few lines, over real connections."""

import queue
import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from migration.errors import RemoteProtocolError
from migration.partition import BLOCK_PAGES
from migration.pb.migration_pb2 import ChunkAck, PageChunk
from source_node.page_reader import OutgoingChunk
from source_node.page_stream import WINDOW_CHUNKS, PageStream

PATIENCE_S = 20.0
STREAMS = pytest.mark.parametrize("streams", [1, 3])


def pages(count):
    return np.arange(count, dtype=np.uint64)


class Reader:
    """Stands for PageReader: one page a chunk, and no RAM behind it."""

    def __init__(self, fails_at=None):
        self.pages = 1 << 16
        self.fails_at = fails_at

    def chunks_of(self, numbers, round_index, pfns):
        for pfn in pfns.tolist():
            if pfn == self.fails_at:
                raise OSError("no such page")
            message = self._message(numbers, round_index, run_first=[pfn], run_pages=[1])
            yield OutgoingChunk(message, 1, 0, np.array([pfn], np.uint64))

    def marker(self, numbers, round_index):
        return OutgoingChunk(self._message(numbers, round_index), 0, 0, np.empty(0, np.uint64))

    def _message(self, numbers, round_index, **fields):
        sequence, numbers.next_sequence = numbers.next_sequence, numbers.next_sequence + 1
        chunk = PageChunk(round=round_index, sequence=sequence, stream=numbers.stream, **fields)
        return chunk.SerializeToString()


class Told:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.queue = queue.SimpleQueue()

    def pages_sent(self, sent):
        self.queue.put(("sent", sent.data_pages))

    def all_acknowledged(self):
        self.queue.put(("acknowledged",))

    def stream_lost(self, reason, *, refused):
        self.queue.put(("lost", reason, refused))

    def next(self):
        return self.queue.get(timeout=PATIENCE_S)


def serve(handler, port=0):
    """A server whose page streams `handler(messages, context)` takes, and its port."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    method = grpc.stream_stream_rpc_method_handler(handler, response_serializer=ChunkAck.SerializeToString)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("ballast.v1.Migration", {"Pages": method}),)
    )
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


@contextmanager
def stream_to(handler, *, streams=1, reader=None, bytes_per_second=None):
    """Streams whose chunks `handler(messages, context)` takes; and what they told."""
    server, port = serve(handler)
    told = Told()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = PageStream(
            channel, told, reader or Reader(), streams=streams, bytes_per_second=bytes_per_second
        )
        yield stream, told
        stream.cancel()
    server.stop(None).wait()


def acknowledging_every(chunks, taken=None):
    def handler(messages, _context):
        for number, message in enumerate(messages, start=1):
            chunk = PageChunk.FromString(message)
            if taken is not None:
                taken.append(chunk)
            if number % chunks == 0 or not chunk.run_first:
                yield ChunkAck(stored_below=chunk.sequence + 1)

    return handler


@STREAMS
def test_batches_are_told_and_acknowledged_and_the_streams_close(streams) -> None:
    taken = []
    with stream_to(acknowledging_every(2, taken), streams=streams) as (stream, told):
        for _ in range(3):
            stream.send(1, pages(5 * BLOCK_PAGES)[::16])
            assert told.next() == ("sent", 160)
        stream.await_acknowledgements(1)
        assert told.next() == ("acknowledged",)
        sent = stream.sent_chunks
        assert stream.close(PATIENCE_S)
        assert told.queue.empty()
    assert told.queue.empty(), "an end that we asked for is no loss"
    assert sent == len(taken) == stream.messages
    for index in range(streams):
        mine = [chunk for chunk in taken if chunk.stream == index]
        assert [chunk.sequence for chunk in mine] == list(range(len(mine)))
        blocks = {first // BLOCK_PAGES for chunk in mine for first in chunk.run_first}
        assert blocks == set(range(index, 5, streams))


@STREAMS
def test_no_more_than_the_window_goes_unacknowledged(streams) -> None:
    taken = queue.SimpleQueue()

    def handler(messages, _context):
        for _ in messages:
            taken.put(None)
        yield from ()

    window = WINDOW_CHUNKS // streams * streams
    with stream_to(handler, streams=streams) as (stream, told):
        stream.send(1, pages(streams * BLOCK_PAGES))
        for _ in range(window):
            taken.get(timeout=PATIENCE_S)
        # That the last one does not come cannot be waited for; that it was not counted as sent can be seen.
        assert stream.sent_chunks == window
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
        stream.send(1, pages(10_000))
        assert told.next() == ("lost", "page stream: invalid argument: bad page chunk", True)
        if bytes_per_second is not None:
            assert stream.sent_chunks <= 16 + WINDOW_CHUNKS
        assert told.queue.empty()
    assert told.queue.empty()


def test_a_destination_that_ends_the_stream_refuses() -> None:
    def handler(messages, _context):
        next(messages)
        yield ChunkAck(stored_below=1)

    with stream_to(handler) as (stream, told):
        stream.send(1, pages(10_000))
        assert told.next() == ("lost", "the destination ended the page stream", True)


@STREAMS
def test_a_destination_that_is_not_there_is_a_lost_connection_told_once(streams) -> None:
    told = Told()
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stream = PageStream(channel, told, Reader(), streams=streams, bytes_per_second=None)
        kind, reason, refused = told.next()
        assert (kind, refused) == ("lost", False)
        assert reason.startswith("page stream: unavailable")
        stream.cancel()
    assert told.queue.empty()


@STREAMS
def test_pages_that_cannot_be_read_are_told_once(streams) -> None:
    with stream_to(acknowledging_every(16), streams=streams, reader=Reader(fails_at=3)) as (stream, told):
        stream.send(1, pages(10))
        assert told.next() == ("lost", "pages cannot be read: OSError: no such page", True)
    assert told.queue.empty()


@STREAMS
@pytest.mark.parametrize("bytes_per_second", [None, 1.0])
def test_cancel_ends_streams_that_wait(bytes_per_second, streams) -> None:
    """For acknowledgements that do not come, or for the bandwidth's next slot."""

    def handler(messages, _context):
        for _ in messages:
            pass
        yield from ()

    with stream_to(handler, streams=streams, bytes_per_second=bytes_per_second) as (stream, told):
        stream.send(1, pages(BLOCK_PAGES * streams))
        stream.cancel()
        stream.cancel()
    while not told.queue.empty():
        assert told.next()[0] == "sent"


@STREAMS
def test_a_lost_connection_comes_back_and_nothing_stored_is_sent_again(streams) -> None:
    """The destination stores what comes until it is gone; it had acknowledged less, and says so when asked."""
    sent, stored_below, first_life = pages(streams * BLOCK_PAGES)[::4], [0] * streams, []
    died = threading.Event()

    def dying(messages, _context):
        for message in messages:
            chunk = PageChunk.FromString(message)
            if len(first_life) >= 12:
                died.set()
                continue  # taken from the wire and never stored
            first_life.append(chunk)
            stored_below[chunk.stream] = max(stored_below[chunk.stream], chunk.sequence + 1)
            if chunk.sequence == 4:
                yield ChunkAck(stored_below=5)

    server, port = serve(dying)
    told = Told()
    with grpc.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.min_reconnect_backoff_ms", 100)]
    ) as channel:
        stream = PageStream(channel, told, Reader(), streams=streams, bytes_per_second=None)
        stream.send(1, sent)
        assert died.wait(PATIENCE_S)
        server.stop(None).wait()
        while (heard := told.next())[0] != "lost":
            assert heard[0] == "sent"
        assert heard[2] is False
        second_life = []
        server, _ = serve(acknowledging_every(2, second_life), port)
        stored = {chunk.run_first[0] for chunk in first_life}
        again = stream.resume(list(stored_below))
        assert not stored & set(again.tolist())
        while (heard := told.next())[0] != "sent":
            pytest.fail(f"{heard} instead of the batch that was under way")
        assert heard == ("sent", len(sent)), "a page sent twice is told once"
        stream.await_acknowledgements(1)
        assert told.next() == ("acknowledged",)
        assert stream.sent_chunks == len({(c.stream, c.sequence) for c in [*first_life, *second_life]})
        assert stream.close(PATIENCE_S)
    server.stop(None).wait()
    got = [chunk.run_first[0] for chunk in [*first_life, *second_life] if chunk.run_first]
    assert sorted(got) == sent.tolist(), "every page once"
    for index in range(streams):
        numbers = [c.sequence for c in [*first_life, *second_life] if c.stream == index]
        assert numbers == list(range(len(numbers)))
    assert stream.resent_pages == len(again)


def test_a_destination_cannot_have_stored_what_was_never_sent() -> None:
    told = Told()
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stream = PageStream(channel, told, Reader(), streams=1, bytes_per_second=None)
        assert told.next()[0] == "lost"
        with pytest.raises(RemoteProtocolError):
            stream.resume([0, 0])
        with pytest.raises(RemoteProtocolError):
            stream.resume([10**6])
        stream.cancel()
