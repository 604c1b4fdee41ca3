"""Peers that know the protocol and break it on purpose: every call is refused in one line, counted, and cheap.

The destination is the real one, in this process; only its guest agent is a stand-in.
"""

import threading

import grpc
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dest_node import intake, outcomes
from dest_node.requests import LINK_TIMEOUT_MS_MAX, MIGRATION_CHARACTERS_MAX, VCPU_STATE_BYTES_MAX
from host.__main__ import CALLS_MAX, MIGRATION_THREADS
from migration.codec import Packing
from migration.delta import Deltas
from migration.pages import PAGE_BYTES
from migration.partition import STREAMS_MAX
from migration.pb import migration_pb2 as pb
from tests.live.hostile import PAGES, STATE, chunk, code_of, digest_of, hostile_bed, key
from tests.live.runs import is_one_line, waited_for

pytestmark = pytest.mark.live

Code = grpc.StatusCode
REFUSALS = {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.RESOURCE_EXHAUSTED}
MIB = 1 << 20
LULL_S = 1.5  # long enough for the next call of a busy machine, short enough to wait for its end
SOON_S = 0.3  # where nothing has to come in time
PROCESS = psutil.Process()


@pytest.fixture(scope="module", name="module_bed")
def fixture_module_bed(tmp_path_factory):
    with hostile_bed(tmp_path_factory.mktemp("hostile")) as bed:
        yield bed


@pytest.fixture
def bed(module_bed):
    module_bed.fresh()
    return module_bed


def refusal(call, *arguments, **fields):
    """The one line of a call that must be refused, and not by an accident."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **fields)
    assert caught.value.code() in REFUSALS, caught.value
    assert is_one_line(caught.value.details())
    assert len(caught.value.details()) < 1000
    return caught.value.details()


# -- fields ----------------------------------------------------------------------------------------

KEYS = {
    "no migration": key(migration=""),
    "no attempt": key(0),
    "a name without end": key(migration="x" * (MIGRATION_CHARACTERS_MAX + 1)),
    "a name of 4 MiB": key(migration="x" * (4 << 20)),
    "a name with line ends": key(migration="m\nERROR m"),
    "a name with a zero byte": key(migration="m\0"),
    "an epoch that the journal cannot hold": key(epoch=2**63),
    "the last epoch": key(epoch=2**64 - 1),
}


@pytest.mark.parametrize("method", ["Open", "Prepare", "Commit", "Abort", "Forget"])
@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_nobody_has_is_refused_by_every_call(bed, method, name):
    request = getattr(pb, f"{method}Request")(id=KEYS[name])
    if method == "Open":
        request.memory_bytes, request.page_bytes, request.integrity = PAGE_BYTES, PAGE_BYTES, "full"
    before = bed.refused()
    refusal(getattr(bed.stub, method), request)
    assert bed.refused() == before + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"streams": STREAMS_MAX + 1},
        {"streams": 10**9},
        {"link_timeout_ms": LINK_TIMEOUT_MS_MAX + 1},
        {"link_timeout_ms": 2**32 - 1},
        {"integrity": "x" * MIB},
        {"memory_bytes": 2**64 - PAGE_BYTES},
        {"resume": True},
        {"resume": True, "streams": 10**9},
    ],
    ids=str,
)
def test_an_open_that_cannot_be_is_refused_and_reserves_nothing(bed, fields):
    refusal(bed.open, key(), **fields)
    assert bed.host.journal.entries("dest") == []
    assert bed.honest(key()) == pb.DECISION_COMMITTED


@pytest.mark.parametrize("method", ["Open", "Prepare", "Commit", "Abort", "Forget"])
def test_bytes_that_are_no_message_are_refused_and_counted_without_a_traceback(bed, method, capfd):
    before = bed.host.refused.counts().get(method, {}).get("invalid_argument", 0)
    assert code_of(bed.raw, method, b"\xff\xff\xff\xff garbage") is Code.INVALID_ARGUMENT
    assert bed.host.refused.counts()[method]["invalid_argument"] == before + 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_method_that_does_not_exist_is_counted_under_one_name(bed):
    for name in ("Steal", "x" * 1000):
        assert code_of(bed.raw, name, b"") is Code.UNIMPLEMENTED
    assert bed.host.refused.counts()["(unknown method)"]["unimplemented"] >= 2
    assert not [method for method in bed.host.refused.counts() if "Steal" in method or "xx" in method]


def test_a_request_beyond_every_limit_is_refused(bed):
    bed.open(key())
    request = pb.PrepareRequest(id=key(), vcpu_state=bytes(16 * MIB))
    assert code_of(bed.stub.Prepare, request) is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "fields",
    [
        {"vcpu_state": bytes(VCPU_STATE_BYTES_MAX + 1)},
        {"device": pb.DeviceState(ring_bases=[0] * 100_000)},
        {"device": pb.DeviceState(ring_bases=[2**32 - 1])},
    ],
    ids=["a state without end", "rings without end", "a base of 32 bits"],
)
def test_an_image_that_cannot_be_is_refused_before_anything_is_done_about_it(bed, fields):
    incarnation = bed.open(key()).incarnation
    refusal(bed.stub.Prepare, pb.PrepareRequest(id=key(), incarnation=incarnation, **fields))
    assert bed.guest.state == "standby"
    bed.stub.Abort(pb.AbortRequest(id=key()))
    assert bed.honest(key(2)) == pb.DECISION_COMMITTED


def test_words_without_end_are_recorded_as_one_line(bed):
    bed.open(key())
    bed.stub.Abort(pb.AbortRequest(id=key(), reason="no\n" * MIB))
    (entry,) = bed.host.journal.entries("dest")
    assert is_one_line(entry.detail)
    assert len(entry.detail) <= 300


# -- phases and ids ----------------------------------------------------------------------------------


def test_calls_about_an_attempt_that_is_not_at_hand_change_nothing(bed):
    incarnation = bed.open(key()).incarnation
    for other in (key(2), key(migration="other"), key(epoch=2)):
        assert bed.stub.Prepare(pb.PrepareRequest(id=other, incarnation=incarnation)).decision == 0
        assert bed.stub.Commit(pb.CommitRequest(id=other)).decision == 0
        assert bed.stub.Abort(pb.AbortRequest(id=other)).decision == 0
        bed.stub.Forget(pb.ForgetRequest(id=other))
        assert "cannot be resumed" in refusal(bed.open, other, resume=True)
    assert bed.open(key()).incarnation == incarnation, "still the same memory"


def test_commit_before_prepare_is_refused(bed):
    bed.open(key())
    assert "not possible in phase RECEIVING" in refusal(bed.stub.Commit, pb.CommitRequest(id=key()))
    assert bed.guest.ran == []


def test_the_same_attempt_with_other_conditions_is_refused(bed):
    """A repeated Open once changed the integrity that Prepare was then judged by."""
    incarnation = bed.open(key(), streams=2).incarnation
    for fields in ({"integrity": "stream"}, {"streams": 3}, {"link_timeout_ms": 60_000}):
        for resume in (False, True):
            assert "was opened with" in refusal(
                bed.open, key(), **({"streams": 2, "resume": resume} | fields)
            )
    assert bed.open(key(), streams=2).incarnation == incarnation


def test_an_attempt_that_was_given_up_under_another_epoch_does_not_block_this_host_for_ever(bed):
    """Its row in the journal was found only when the machine had moved: OPENING, for good."""
    bed.open(key())
    bed.stub.Abort(pb.AbortRequest(id=key()))
    assert "was ABORTED here before" in refusal(bed.open, key(epoch=2))
    assert "was ABORTED here before" in refusal(bed.open, key(epoch=3))
    assert bed.honest(key(2)) == pb.DECISION_COMMITTED


def test_everything_replayed_after_the_guest_runs_is_answered_and_runs_nothing_again(bed):
    assert bed.honest(key()) == pb.DECISION_COMMITTED
    assert code_of(bed.open, key()) in REFUSALS
    assert code_of(bed.open, key(2)) in REFUSALS
    assert code_of(bed.stub.Prepare, pb.PrepareRequest(id=key(), incarnation="?")) in REFUSALS
    assert code_of(bed.stub.Commit, pb.CommitRequest(id=key(), image_digest=1)) in REFUSALS
    assert bed.stub.Abort(pb.AbortRequest(id=key())).decision == pb.DECISION_COMMITTED
    assert bed.send(b"") is not None
    assert bed.guest.ran == [2]


# -- pages -------------------------------------------------------------------------------------------


def bombs(incarnation):
    one = np.array([7], np.uint64)
    words = Deltas(np.array([0]), np.array([1]), np.array([0]), np.array([512]))
    unsent = {"packing": Packing(0, words.to_bytes(), 0), "hashes": one}
    yield (
        "lz4 that claims 2 GiB",
        chunk(incarnation, 1, 0, [0], b"\x1f\x00" * 64, packing=Packing(1, b"", 2**31), hashes=one),
    )
    yield "zstd that claims another size", chunk(
        incarnation, 1, 0, [0], b"\x28\xb5\x2f\xfd\xa4\0\0\0\x40" + bytes(64),
        packing=Packing(2, b"", PAGE_BYTES), hashes=one,
    )  # fmt: skip
    yield (
        "noise that is called zstd",
        chunk(incarnation, 1, 0, [0], bytes(range(64)), packing=Packing(2, b"", PAGE_BYTES), hashes=one),
    )
    yield "a delta of a page never sent", chunk(incarnation, 1, 0, [0], bytes(PAGE_BYTES), **unsent)
    yield "a stream that does not exist", chunk(incarnation, 1, 0, [0], bytes(PAGE_BYTES), stream=2**32 - 1)
    yield "the last sequence", chunk(incarnation, 1, 2**64 - 1, [0], bytes(PAGE_BYTES))


def test_bombs_and_deltas_of_nothing_are_refused_and_cost_no_memory(bed):
    before = PROCESS.memory_info().rss
    for attempt in range(1, 7):
        incarnation = bed.open(key(1, migration=f"bomb{attempt}")).incarnation
        name, message = list(bombs(incarnation))[attempt - 1]
        error = bed.send(message)
        assert error is not None, name
        assert error.code() is Code.INVALID_ARGUMENT, (name, error)
        assert is_one_line(error.details()), name
        waited_for(lambda: bed.intake._machine.phase.name == "ABORTED", f"the end of {name}")
    assert PROCESS.memory_info().rss - before < 64 * MIB


def test_as_many_streams_as_there_may_be_leave_a_thread_for_prepare(bed):
    """Each occupies a thread of the server: with as many threads as streams nobody could ever prepare."""
    incarnation = bed.open(key(), streams=STREAMS_MAX).incarnation
    done = threading.Event()

    def endless(stream):
        yield chunk(incarnation, 1, 0, [], stream=stream)
        done.wait(20)

    calls = [bed.pages(endless(stream)) for stream in range(STREAMS_MAX)]
    assert [next(call).stored_below for call in calls] == [1] * STREAMS_MAX
    reply = bed.stub.Prepare(
        pb.PrepareRequest(
            id=key(), incarnation=incarnation, chunks=STREAMS_MAX, device=STATE,
            image_digest=digest_of(np.zeros(PAGES, np.uint64)),
        ),
        timeout=10,
    )  # fmt: skip
    done.set()
    assert reply.decision == pb.DECISION_PREPARED


@pytest.mark.parametrize("says", [(), ("marker",)], ids=["nothing at all", "one marker, then nothing"])
def test_a_stream_that_is_open_and_silent_does_not_occupy_this_host_for_ever(bed, monkeypatch, says):
    done = threading.Event()

    def loris(incarnation):
        for _ in says:
            yield chunk(incarnation, 1, 0, [])
        done.wait(20)

    with (
        monkeypatch.context() as impatient
    ):  # with this one alone: an honest peer may be slow on a busy machine
        impatient.setattr(intake, "SILENCE_S", SOON_S)
        impatient.setattr(intake, "STREAM_SILENCE_S_MAX", SOON_S)
        call = bed.pages(loris(bed.open(key()).incarnation))
        with pytest.raises(grpc.RpcError):
            list(call)
    done.set()
    # The stream is cut before the end is recorded.
    waited_for(lambda: bed.host.journal.entries("dest")[0].state == "ABORTED", "the attempt's end")
    (entry,) = bed.host.journal.entries("dest")
    assert f"silent for {SOON_S:g} s" in entry.detail
    assert bed.honest(key(2)) == pb.DECISION_COMMITTED


def test_a_half_closed_stream_proves_nothing_and_ends_in_time(bed, monkeypatch):
    monkeypatch.setattr(intake, "SILENCE_S", LULL_S)
    incarnation = bed.open(key()).incarnation
    assert bed.send(chunk(incarnation, 1, 0, [1], bytes(PAGE_BYTES))) is None
    waited_for(lambda: bed.host.journal.entries("dest")[0].state == "ABORTED", "the attempt's end")


# -- floods --------------------------------------------------------------------------------------------


def test_floods_of_attempts_cost_bounded_memory_threads_and_descriptors(bed, monkeypatch):
    monkeypatch.setattr(outcomes, "OUTCOMES_MAX", 100)
    bed.open(key(migration="warm"))
    rss, threads, fds = PROCESS.memory_info().rss, threading.active_count(), PROCESS.num_fds()
    for number in range(300):
        name = f"flood{number}"
        code_of(bed.open, key(migration=name))
        code_of(bed.stub.Prepare, pb.PrepareRequest(id=key(migration=name), incarnation="?"))
        code_of(bed.open, key(migration=name), resume=True)
    assert bed.host.journal.count("dest") == 100
    assert "say Forget" in refusal(bed.open, key(migration="one more"))
    assert PROCESS.memory_info().rss - rss < 16 * MIB
    assert threading.active_count() <= threads + MIGRATION_THREADS
    assert PROCESS.num_fds() <= fds + 8
    told = [fact for fact in bed.events._facts if fact.name == "call_refused"]
    assert len(told) < 100, "a flood of calls is no flood of events"
    for entry in bed.host.journal.entries("dest"):
        message = pb.AttemptId(migration=entry.key.migration, attempt=1, guest_epoch=1)
        bed.stub.Abort(pb.AbortRequest(id=message))
        bed.stub.Forget(pb.ForgetRequest(id=message))
    assert bed.honest(key()) == pb.DECISION_COMMITTED


def test_a_flood_of_calls_at_once_is_turned_away_and_the_ones_inside_are_served(bed):
    bed.host.points.arm("receiving.recorded")
    request = pb.OpenRequest(id=key(), memory_bytes=PAGE_BYTES, page_bytes=PAGE_BYTES, integrity="full")
    channels = [grpc.insecure_channel(bed.address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(3)]
    path = "/ballast.v1.Migration/Open"
    calls = [
        channel.unary_unary(path).future(request.SerializeToString(), timeout=20)
        for channel in channels
        for _ in range(CALLS_MAX)
    ]
    waited_for(lambda: sum(call.done() for call in calls) >= 2 * CALLS_MAX, "the surplus to be turned away")
    bed.host.points.release("receiving.recorded")
    codes = [call.code() for call in calls]
    assert codes.count(Code.RESOURCE_EXHAUSTED) == 2 * CALLS_MAX
    assert codes.count(Code.OK) == CALLS_MAX
    for channel in channels:
        channel.close()


# -- everything at random --------------------------------------------------------------------------------

IDS = st.builds(
    key,
    st.sampled_from([1, 1, 1, 2, 3]),
    migration=st.sampled_from(["m", "m", "n"]),
    epoch=st.sampled_from([1, 1, 1, 2]),
)
STEPS = st.one_of(
    st.tuples(
        st.just("open"), IDS, st.booleans(), st.sampled_from([0, 0, 60_000]), st.sampled_from([1, 1, 2])
    ),
    st.tuples(
        st.just("pages"), st.integers(0, 2), st.integers(0, 2), st.sampled_from(["good", "bad", "stale"])
    ),
    st.tuples(st.just("prepare"), IDS, st.booleans(), st.booleans(), st.integers(0, 2)),
    st.tuples(st.just("commit"), IDS, st.booleans()),
    st.tuples(st.just("abort"), IDS),
    st.tuples(st.just("forget"), IDS),
)


class Session:
    """A source that says whatever comes to its mind, and knows what would have been right."""

    def __init__(self, bed):
        self.bed, self.incarnation, self.attempt = bed, "?", 1
        self.stored = np.zeros(PAGES, np.uint64)

    def step(self, what, *parts):
        return getattr(self, what)(*parts)

    def open(self, an_id, resume, link_timeout_ms, streams):
        try:
            reply = self.bed.open(an_id, resume=resume, link_timeout_ms=link_timeout_ms, streams=streams)
        except grpc.RpcError as error:
            return error.code()
        if reply.incarnation != self.incarnation:
            self.incarnation, self.attempt = reply.incarnation, an_id.attempt
            self.stored = np.zeros(PAGES, np.uint64)
        return Code.OK

    def pages(self, sequence, stream, how):
        incarnation = "f" * 32 if how == "stale" else self.incarnation
        message = chunk(incarnation, self.attempt, sequence, [], stream=stream)
        error = self.bed.send(message[:-1] if how == "bad" else message)
        return Code.OK if error is None else error.code()

    def prepare(self, an_id, right, rehearsal, chunks):
        request = pb.PrepareRequest(
            id=an_id, incarnation=self.incarnation if right else "?", chunks=chunks, device=STATE,
            image_digest=digest_of(self.stored), rehearsal=rehearsal,
        )  # fmt: skip
        return code_of(self.bed.stub.Prepare, request)

    def commit(self, an_id, right):
        request = pb.CommitRequest(id=an_id, image_digest=digest_of(self.stored) if right else 1)
        return code_of(self.bed.stub.Commit, request)

    def abort(self, an_id):
        return code_of(self.bed.stub.Abort, pb.AbortRequest(id=an_id))

    def forget(self, an_id):
        return code_of(self.bed.stub.Forget, pb.ForgetRequest(id=an_id))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=14))
def test_no_sequence_of_calls_breaks_the_destination_or_runs_two_guests(module_bed, steps):
    """Whatever is said: a typed answer, one guest at most and only after COMMITTED; the next source is served."""
    bed = module_bed
    bed.fresh()
    session = Session(bed)
    for step in steps:
        assert session.step(*step) in REFUSALS | {Code.OK}, step
        states = [entry.state for entry in bed.host.journal.entries("dest")]
        assert sum(state in ("RECEIVING", "PREPARED") for state in states) <= 1
        assert len(bed.guest.ran) <= 1
        assert not bed.guest.ran or bed.intake._machine.phase.name == "COMMITTED" or "COMMITTED" not in states
    if bed.guest.ran:
        return
    at_hand = bed.intake._machine.key
    if at_hand is not None:
        last = pb.AttemptId(
            migration=at_hand.migration, attempt=at_hand.attempt, guest_epoch=at_hand.guest_epoch
        )
        bed.stub.Abort(pb.AbortRequest(id=last))
    assert bed.honest(key(9, migration="honest")) == pb.DECISION_COMMITTED


# -- as many streams as may be -------------------------------------------------------------------------


def test_all_streams_there_may_be_are_served_and_come_again_after_a_loss_that_nobody_noticed(bed):
    """Every stream holds a thread; those of the lost connection still do when Open(resume) has to be heard."""
    opened = {"streams": STREAMS_MAX, "link_timeout_ms": 20_000}
    incarnation = bed.open(key(), **opened).incarnation
    ends = threading.Event()

    def messages(stream, sequence):
        yield chunk(incarnation, 1, sequence, [], stream=stream)
        ends.wait(20)  # the stream stays open, and its thread over there stays occupied

    calls = []
    for connection in range(2):
        calls = [bed.pages(messages(stream, connection)) for stream in range(STREAMS_MAX)]
        assert [next(call).stored_below for call in calls] == [connection + 1] * STREAMS_MAX
        if not connection:
            assert bed.open(key(), resume=True, **opened).stored_below == [1] * STREAMS_MAX
    assert bed.stub.Abort(pb.AbortRequest(id=key()), timeout=10).decision == pb.DECISION_ABORTED
    ends.set()
