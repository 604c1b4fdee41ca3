"""What the end of a call says: an answer, a refusal, a link that was lost, or one that was never up."""

from types import SimpleNamespace

import grpc
import pytest

from migration import events as told
from migration.identity import AttemptKey
from migration.pb import migration_pb2
from source_node.destination import Destination

KEY = AttemptKey("m", 1, 1)


class Call:
    """An Open on its way: `end` is how it is answered."""

    def __init__(self):
        self._done = None

    def future(self, *_, **__):
        return self

    def add_done_callback(self, done):
        self._done = done

    def end(self, error=None, reply=None):
        self.error, self.reply = error, reply
        self._done(self)

    def code(self):
        return self.error.code()

    def result(self):
        if self.error is not None:
            raise self.error
        return self.reply


class Refusal(grpc.RpcError):
    def __init__(self, code, words="no"):
        self._code = code
        self._words = words

    def code(self):
        return self._code

    def details(self):
        return self._words


NOBODY = Refusal(
    grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: Connection refused"
)
UNKNOWN_NAME = Refusal(grpc.StatusCode.UNAVAILABLE, "errors resolving b:1: not found")
ANOTHERS_NAME = Refusal(
    grpc.StatusCode.UNAVAILABLE,
    "failed to connect to all addresses; last error: Hostname Verification Check failed.",
)
NO_GRPC = Refusal(
    grpc.StatusCode.UNAVAILABLE,
    "failed to connect to all addresses; last error: Failed parsing HTTP/2 (Expected SETTINGS frame)",
)
SLOW = Refusal(
    grpc.StatusCode.UNAVAILABLE,
    "failed to connect to all addresses; last error: connection attempt timed out before receiving SETTINGS frame",
)
BROKEN = Refusal(grpc.StatusCode.UNAVAILABLE, "Socket closed")
SILENT = Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


@pytest.mark.parametrize(
    ("ending", "must_be_told_again"),
    [
        (None, True),
        ({"error": BROKEN}, True),
        ({"error": NOBODY}, False),
        ({"error": Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED)}, False),
        ({"reply": SimpleNamespace(incarnation="one")}, False),
    ],
    ids=["unanswered", "lost", "nobody", "refused", "opened"],
)
def test_an_abort_that_may_have_overtaken_its_open_is_told_again(ending, must_be_told_again):
    peer, call = Destination("127.0.0.1:1", KEY, lambda _: None), Call()
    peer._stub = SimpleNamespace(Open=call, Abort=lambda *_, **__: None)
    peer.open(4096, "full", 1, 0)
    if ending is not None:
        call.end(**ending)
    assert bool(peer.abort("cancelled")) is must_be_told_again
    peer.close()


@pytest.fixture(name="asked_by_hand")
def fixture_asked_by_hand():
    """A destination whose every call ends as the test says, and what was told of that."""
    told_here, call = [], Call()
    peer = Destination("127.0.0.1:1", KEY, told_here.append)
    peer._stub = SimpleNamespace(Open=call, Prepare=call, Commit=call)
    yield peer, call, told_here
    peer.close()


@pytest.mark.parametrize(
    "error",
    [NOBODY, UNKNOWN_NAME, NO_GRPC, ANOTHERS_NAME],
    ids=["nobody", "unknown name", "no gRPC server", "another's name"],
)
def test_a_link_that_was_never_up_is_not_lost(asked_by_hand, error):
    peer, call, told_here = asked_by_hand
    peer.open(4096, "full", 1, 10_000)
    call.end(error)
    assert told_here == [told.PeerLost(f"Open to 127.0.0.1:1: unavailable: {error.details()}")]
    assert not peer.abort("cancelled"), "there is nobody who would have to hear of it, and nobody is called"


def test_an_address_that_says_nothing_may_be_at_the_end_of_a_slow_link(asked_by_hand):
    peer, call, told_here = asked_by_hand
    peer.open(4096, "full", 1, 10_000)
    call.end(SLOW)
    assert [type(event) for event in told_here] == [told.LinkLost]
    assert not peer.abort("cancelled"), "nobody has heard of it yet"
    peer.open(4096, "full", 1, 10_000)
    call.end(reply=SimpleNamespace(incarnation="one"))
    assert told_here[1:] == [told.DestinationOpened("one")]


@pytest.mark.parametrize("error", [BROKEN, SILENT], ids=["broken", "silent"])
def test_a_link_that_was_up_is_lost_however_the_next_questions_fail(asked_by_hand, error):
    """The answer of Open may have been lost: that the destination cannot be had again meanwhile is no answer."""
    peer, call, told_here = asked_by_hand
    for ending in (error, NOBODY, NOBODY):
        peer.open(4096, "full", 1, 10_000)
        call.end(ending)
    assert [type(event) for event in told_here] == [told.LinkLost] * 3


def test_after_open_was_answered_nobody_there_is_a_lost_link(asked_by_hand):
    peer, call, told_here = asked_by_hand
    peer.open(4096, "full", 1, 10_000)
    call.end(reply=SimpleNamespace(incarnation="one"))
    for ask in (peer.resume, lambda: peer.prepare(migration_pb2.PrepareRequest()), lambda: peer.commit(1)):
        ask()
        call.end(NOBODY)
    assert [type(event) for event in told_here[1:]] == [told.LinkLost] * 3


def test_a_commit_that_is_asked_by_a_new_process_has_nothing_but_lost_links(asked_by_hand):
    """It opens nothing: the destination was there when its source prepared it."""
    peer, call, told_here = asked_by_hand
    peer.commit(1)
    call.end(NOBODY)
    assert isinstance(told_here[0], told.LinkLost)
