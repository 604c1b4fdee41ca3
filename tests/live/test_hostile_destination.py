"""Destinations that answer what cannot be: each answer is one bounded line of blame, in time, whatever they say."""

import queue
import threading

import grpc
import pytest

from migration import events as told
from migration.errors import RemoteProtocolError
from migration.identity import AttemptKey
from migration.pb import migration_pb2 as pb
from source_node import destination
from source_node.destination import Destination
from source_node.migration_run import MigrationRun
from tests.live.liars import answers, grpc_liar
from tests.live.runs import is_one_line

pytestmark = pytest.mark.live

KEY = AttemptKey("m", 1, 1)
PATIENCE_S = 10.0
GOOD = pb.OpenReply(incarnation="0" * 32)


class Asking:
    """A source's end of one attempt, and what it was told."""

    def __init__(self, address):
        self.told = queue.SimpleQueue()
        self.destination = Destination(address, KEY, self.told.put)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.destination.close()

    def open(self, streams=2):
        self.destination.open(1 << 20, "full", streams, 0)
        return self.told.get(timeout=PATIENCE_S)

    def resume(self):
        self.destination.resume()
        return self.told.get(timeout=PATIENCE_S)

    def prepare(self):
        self.destination.prepare(pb.PrepareRequest())
        return self.told.get(timeout=PATIENCE_S)

    def commit(self):
        self.destination.commit(1)
        return self.told.get(timeout=PATIENCE_S)


def asking(methods):
    return grpc_liar({name: answers(reply.SerializeToString()) for name, reply in methods.items()})


@pytest.mark.parametrize("incarnation", ["", "x" * 65, "x" * (4 << 20)], ids=["none", "65", "4 MiB"])
def test_a_memory_without_a_name_or_with_one_without_end_is_refused(incarnation):
    """It would be in every chunk."""
    with asking({"Open": pb.OpenReply(incarnation=incarnation)}) as address, Asking(address) as source:
        answer = source.open()
    assert isinstance(answer, told.PeerLost)
    assert is_one_line(answer.reason)


@pytest.mark.parametrize(
    "reply",
    [
        pb.OpenReply(incarnation="f" * 32, stored_below=[0, 0]),
        pb.OpenReply(incarnation="0" * 32),
        pb.OpenReply(incarnation="0" * 32, stored_below=[0]),
        pb.OpenReply(incarnation="0" * 32, stored_below=[0] * 500_000),
    ],
    ids=["another memory", "no streams", "a stream too few", "streams without end"],
)
def test_going_on_with_something_else_is_refused(reply):
    replies = [GOOD.SerializeToString(), reply.SerializeToString()]
    method = grpc.unary_unary_rpc_method_handler(lambda _request, _context: replies.pop(0))
    with grpc_liar({"Open": method}) as address, Asking(address) as source:
        assert isinstance(source.open(), told.DestinationOpened)
        answer = source.resume()
    assert isinstance(answer, told.PeerLost)
    assert is_one_line(answer.reason)


@pytest.mark.parametrize("decision", range(9))
def test_a_decision_is_one_that_exists_and_its_words_are_one_line(decision):
    reply = {"decision": decision, "reason": "no\n" * (1 << 15)}
    methods = {"Prepare": pb.PrepareReply(**reply), "Commit": pb.CommitReply(**reply)}
    with asking(methods) as address, Asking(address) as source:
        for answer in (source.prepare(), source.commit()):
            assert answer.answer in told.Answer
            assert is_one_line(answer.reason)
            assert len(answer.reason) <= destination.REASON_CHARACTERS_MAX


def test_refusals_with_no_end_of_words_are_one_line():
    def refuse(_request, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no\n" * 1500)

    method = grpc.unary_unary_rpc_method_handler(refuse)
    with grpc_liar({"Open": method}) as address, Asking(address) as source:
        answer = source.open()
    assert isinstance(answer, told.PeerLost)
    assert is_one_line(answer.reason)
    assert len(answer.reason) < 400


@pytest.mark.parametrize("method", ["Open", "Prepare", "Commit"])
def test_a_destination_that_never_answers_is_a_lost_link_at_the_deadline(monkeypatch, method):
    monkeypatch.setattr(destination, f"{method.upper()}_TIMEOUT_S", 0.2)
    over = threading.Event()

    def silent(_request, _context):
        over.wait(PATIENCE_S)
        return b""

    with grpc_liar({method: grpc.unary_unary_rpc_method_handler(silent)}) as address:
        with Asking(address) as source:
            answer = getattr(source, method.lower())()
        over.set()
    assert isinstance(answer, told.LinkLost)
    assert "deadline exceeded" in answer.reason


def test_what_a_destination_cannot_have_stored_blames_the_destination():
    """It was told as an internal error of the source."""

    class Machine:
        reversible = True

        def handle(self, _event, _now_ns):
            raise RemoteProtocolError("an acknowledgement that cannot be", stored=9, sent=1)

    a_run = object.__new__(MigrationRun)
    a_run._machine, a_run._first = Machine(), []
    a_run._feed_or_turn_back(told.DestinationResumed((9,)))
    (answer,) = a_run._first
    assert isinstance(answer, told.PeerLost)
    assert answer.reason.startswith("the destination broke the protocol: an acknowledgement that cannot be")
