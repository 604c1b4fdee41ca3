"""Peers that talk nonsense: a source meets destinations that are none, a destination meets a source that lies.

One guest for all of them: whatever its hosts hear, it runs on, gets its pages back, and migrates in the end.
"""

import json
import os
import socket
import threading

import grpc
import numpy as np
import pytest

from migration.codec import ChunkHeader, encode_chunk, page_hashes
from migration.pages import PAGE_BYTES
from migration.pb import migration_pb2 as pb
from migration.pb import migration_pb2_grpc
from testbed.checkers import memory
from testbed.errors import RunBrokenError
from testbed.record.run_record import load
from tests.live.liars import LIES, grpc_liar, resumes_with, tcp_liar
from tests.live.runs import TINY, WRITER, Bed, is_one_line, scenario

pytestmark = pytest.mark.live

PAGES = 16384
REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION}
REASON_CHARACTERS_MAX = 1000


# -- destinations that are none ------------------------------------------------------------------


@pytest.fixture(scope="module")
def giver(tmp_path_factory):
    """A source whose attempts go wrong; at last its guest leaves for a real destination, whole."""
    text = WRITER.replace("rounds_max = 3", "rounds_max = 1")
    with Bed(tmp_path_factory.mktemp("giver"), scenario(text=text)) as bed:
        yield bed
        ended = bed.migrate()
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        bed.wait("guest_running", "dest")
        bed.check(bed.dest)


def assert_failed_in_one_line(bed, ended):
    assert ended.fields["outcome"] == "failed", ended.fields
    assert is_one_line(ended.fields["reason"]), ended.fields["reason"]
    assert len(ended.fields["reason"]) < REASON_CHARACTERS_MAX
    bed.guest_is_back()


@pytest.mark.parametrize("lie", LIES)
def test_a_grpc_server_that_answers_nonsense_is_no_destination(giver, lie):
    with grpc_liar(LIES[lie]) as address:
        assert_failed_in_one_line(giver, giver.migrate(dest_address=address))


@pytest.mark.parametrize("stored_below", [[10**9], [1, 1]], ids=["too many", "another number"])
def test_a_destination_that_goes_on_with_what_it_cannot_have_is_blamed(giver, stored_below):
    with grpc_liar(resumes_with(stored_below)) as address:
        ended = giver.migrate(dest_address=address, link_timeout_ms=10_000, streams=1)
        assert_failed_in_one_line(giver, ended)
    assert "destination" in ended.fields["reason"]
    assert "internal error" not in ended.fields["reason"]


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\n\r\nhello\n", os.urandom(64 << 10)], ids=["http", "noise"]
)
def test_a_tcp_server_that_talks_something_else_is_no_destination(giver, answer):
    with tcp_liar(answer) as address:
        assert_failed_in_one_line(giver, giver.migrate(dest_address=address))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:9", "localhost:nonsense"])
def test_an_address_where_nobody_is(giver, address):
    assert_failed_in_one_line(giver, giver.migrate(dest_address=address))


@pytest.mark.parametrize("address", ["no.such.host.invalid:9", "198.18.0.1:9", "nonsense"])
def test_an_address_beyond_loopback_is_refused_in_plain_text(giver, address):
    with pytest.raises(RunBrokenError, match="plain text is for loopback only"):
        giver.begin(dest_address=address)
    giver.guest_is_back()


def test_an_address_where_nobody_listens_is_given_up_at_once(giver):
    """However long a lost link may take to come back: there was none. And nobody has to hear how it ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    since_ns = giver.begin(dest_address=address, link_timeout_ms=600_000)
    ended = giver.wait("migration_ended", "source", since_ns=since_ns)
    assert_failed_in_one_line(giver, ended)
    assert ended.fields["cause"] == "destination"
    assert ended.fields["reason"].startswith(f"Open to {address}: ")
    assert "refused" in ended.fields["reason"]
    assert ended.fields["recoveries"]["count"] == 0
    for name in ("link_lost", "abort_unheard"):
        assert not [event for event in giver.history.having(name) if event.at_ns >= since_ns], name


def test_a_tcp_server_that_says_nothing_is_given_up_at_the_timeout(giver):
    with tcp_liar(b"") as address:
        ended = giver.migrate(dest_address=address, timeout_ms=300)
    assert ended.fields["outcome"] == "cancelled"
    assert "timeout" in ended.fields["reason"]
    giver.guest_is_back()


# -- a source that lies ----------------------------------------------------------------------------


class LyingSource:
    """One attempt at a real destination, spoken by hand."""

    def __init__(self, bed):
        bed.attempts += 1
        self.id = pb.AttemptId(migration="bed", attempt=bed.attempts, guest_epoch=1)
        self._channel = grpc.insecure_channel(
            bed.hosts.dest.migration_address, options=[("grpc.max_send_message_length", 64 << 20)]
        )
        self.stub = migration_pb2_grpc.MigrationStub(self._channel)
        self._pages = self._channel.stream_stream(
            "/ballast.v1.Migration/Pages", response_deserializer=pb.ChunkAck.FromString
        )
        self.incarnation = ""

    def __enter__(self):
        self.incarnation = self.stub.Open(self.open_request()).incarnation
        return self

    def __exit__(self, *error):
        self.stub.Abort(pb.AbortRequest(id=self.id, reason="the test is over"))
        self._channel.close()

    def open_request(self, **fields):
        chosen = {"memory_bytes": PAGES * PAGE_BYTES, "page_bytes": PAGE_BYTES, "integrity": "full"}
        return pb.OpenRequest(id=self.id, **(chosen | fields))

    def chunk(self, *runs, sequence=0, zero=(), **header):
        """A well-formed chunk, whatever its runs say."""
        first, count = (
            np.array([run[part] for run in runs], dtype) for part, dtype in enumerate((np.uint64, np.uint32))
        )
        zero_first, zero_count = (
            np.array([run[part] for run in zero], dtype) for part, dtype in enumerate((np.uint64, np.uint32))
        )
        data = os.urandom(int(count.sum()) * PAGE_BYTES)
        fields = {
            "incarnation": self.incarnation,
            "attempt": self.id.attempt,
            "round_index": 1,
            "sequence": sequence,
        }
        return encode_chunk(
            ChunkHeader(**(fields | header)), first, count, zero_first, zero_count, page_hashes(data), data
        )

    def send(self, *messages):
        """How the stream ended; acknowledgements are of no interest."""
        try:
            list(self._pages(iter(messages), timeout=20))
        except grpc.RpcError as error:
            return error
        return None

    def decision(self, **fields):
        request = pb.PrepareRequest(id=self.id, incarnation=self.incarnation, **fields)
        return self.stub.Prepare(request)


@pytest.fixture(scope="module")
def taker(tmp_path_factory):
    """A destination that hears lies; at last it takes a real guest in, and every page of it is right."""
    with Bed(tmp_path_factory.mktemp("taker"), scenario(text=TINY)) as bed:
        yield bed
        ended = bed.migrate()
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        bed.fetch("source_hashes", "frames", "sent", "dest_hashes")
        bed.wait("guest_running", "dest")
        bed.check(bed.dest)
    record = load(bed.run_dir.path)
    assert memory.check(record).reasons == ()


@pytest.fixture
def source(taker):
    with LyingSource(taker) as source:
        yield source


def flip(message, at):
    changed = bytearray(message)
    changed[at] ^= 1
    return bytes(changed)


def altered(message, **fields):
    """With other fields, and the hashes as they were."""
    chunk = pb.PageChunk.FromString(message)
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(chunk, name)[:]
            getattr(chunk, name).extend(value)
        else:
            setattr(chunk, name, value)
    return chunk.SerializeToString()


BAD_CHUNKS = {
    "a flipped bit of a page": lambda s: flip(s.chunk((0, 4)), -1),
    "a flipped bit of a page hash": lambda s: altered(s.chunk((0, 1)), page_hashes=bytes(8)),
    "pages moved elsewhere": lambda s: altered(s.chunk((0, 1)), run_first=[1]),
    "less data than pages": lambda s: s.chunk((0, 2))[:-PAGE_BYTES],
    "a page too much": lambda s: altered(s.chunk((0, 1)), data=bytes(2 * PAGE_BYTES)),
    "no hashes": lambda s: altered(s.chunk((0, 1)), page_hashes=b""),
    "one page past the end": lambda s: s.chunk((PAGES - 1, 2)),
    "far outside": lambda s: s.chunk((2**40, 1)),
    "an address that wraps": lambda s: s.chunk((2**64 - 1, 2)),
    "runs that overlap": lambda s: s.chunk((8, 4), (10, 4)),
    "runs that go back": lambda s: s.chunk((8, 1), (4, 1)),
    "an empty run": lambda s: s.chunk((8, 1), (12, 0)),
    "zero records outside": lambda s: s.chunk(zero=[(PAGES, 1)]),
    "zero records without end": lambda s: s.chunk(zero=[(0, 2**32 - 1)]),
    "zero records that wrap": lambda s: s.chunk(zero=[(2**64 - 2, 4)]),
    "a page that is data and zero": lambda s: s.chunk((8, 2), zero=[(9, 1)]),
    "another incarnation": lambda s: s.chunk((0, 1), incarnation="f" * 32),
    "another attempt": lambda s: s.chunk((0, 1), attempt=s.id.attempt + 1),
    "a chunk left out": lambda s: s.chunk((0, 1), sequence=1),
    "no message": lambda _: os.urandom(5000),
    "an empty message": lambda _: b"",
}


@pytest.mark.parametrize("lie", BAD_CHUNKS)
def test_a_bad_chunk_is_refused_and_its_attempt_is_over(source, lie):
    error = source.send(BAD_CHUNKS[lie](source))
    assert error is not None, "it was taken"
    assert error.code() in REFUSALS, error
    assert is_one_line(error.details())
    reply = source.decision(chunks=1)
    assert reply.decision == pb.DECISION_ABORTED, "nothing of it is ever run"
    assert "bad page chunk" in reply.reason


def test_a_chunk_sent_twice_is_refused(source):
    message = source.chunk((0, 1))
    error = source.send(message, message)
    assert error is not None
    assert "out of sequence" in error.details()


def test_a_message_beyond_every_limit_is_refused(source):
    error = source.send(bytes(16 << 20))
    assert error is not None
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_what_was_refused_is_counted_by_kind_and_told(taker, source):
    def refused():
        facts = json.loads(taker.dest.describe().facts_json)
        return facts["refused_calls"].get("Pages", {}).get("invalid_argument", 0)

    before = refused()
    assert source.send(b"") is not None
    assert refused() == before + 1
    told = taker.wait("call_refused", "dest")
    assert is_one_line(told.fields["reason"])


class Endless:
    """Requests that end only when the test says so."""

    def __init__(self, messages):
        self._messages = iter(messages)
        self._closed = threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        for message in self._messages:
            return message
        self._closed.wait(20)
        raise StopIteration

    def close(self):
        self._closed.set()


def test_a_second_stream_beside_the_first_is_refused(source):
    requests = Endless([source.chunk((0, 1)), source.chunk(sequence=1)])
    first = source._pages(requests)
    assert next(first).stored_below == 2, "a chunk without pages asks for an answer"
    error = source.send(source.chunk((1, 1), sequence=2))
    requests.close()
    assert error is not None
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert {ack.stored_below for ack in first} <= {2}
    assert first.code() is grpc.StatusCode.OK, "the first one went on to its end"


@pytest.mark.parametrize(
    "fields",
    [
        {"page_bytes": 65536},
        {"memory_bytes": 0},
        {"memory_bytes": 4097},
        {"memory_bytes": 2**63},
        {"integrity": "none"},
    ],
    ids=str,
)
def test_an_open_that_cannot_be_is_refused(taker, fields):
    liar = LyingSource(taker)
    with pytest.raises(grpc.RpcError) as refused:
        liar.stub.Open(liar.open_request(**fields))
    liar._channel.close()
    assert refused.value.code() in REFUSALS


def test_an_open_for_more_memory_than_there_is_is_refused_as_no_room(taker):
    liar = LyingSource(taker)
    with pytest.raises(grpc.RpcError) as refused:
        liar.stub.Open(liar.open_request(memory_bytes=1 << 45))
    liar._channel.close()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_image_that_was_never_sent_is_not_prepared(source):
    assert source.send(source.chunk((0, 8))) is None
    reply = source.decision(chunks=2, image_digest=1)
    assert (reply.decision, reply.reason.split(" (")[0]) == (pb.DECISION_ABORTED, "chunks are missing")


def test_an_image_of_another_digest_is_not_prepared(source):
    assert source.send(source.chunk((0, 8))) is None
    reply = source.decision(chunks=1, image_digest=1)
    assert (reply.decision, reply.reason.split(" (")[0]) == (pb.DECISION_ABORTED, "the image digest differs")


def test_a_commit_that_nothing_was_prepared_for_is_refused(source):
    with pytest.raises(grpc.RpcError) as refused:
        source.stub.Commit(pb.CommitRequest(id=source.id, image_digest=1))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_calls_about_an_attempt_that_nobody_knows_are_answered_unknown(source):
    other = pb.AttemptId(migration="other", attempt=1, guest_epoch=1)
    assert source.stub.Commit(pb.CommitRequest(id=other)).decision == pb.DECISION_UNSPECIFIED
    assert source.stub.Abort(pb.AbortRequest(id=other)).decision == pb.DECISION_UNSPECIFIED
    assert source.stub.Prepare(pb.PrepareRequest(id=other)).decision == pb.DECISION_UNSPECIFIED
