"""A connection that ends while the destination works: its late news and chunks change nothing of the next one."""

import threading

import pytest

from dest_node.arrivals import Arrivals
from dest_node.intake import StreamEnd
from dest_node.page_receiver import StreamOver
from dest_node.servicer import MigrationServicer
from migration.dest_phases import DestPhase
from tests.core.intake_bed import KEY, Bed, chunk

PATIENCE_S = 10.0
LINK = {"link_timeout_ms": 30_000}


@pytest.fixture(name="bed")
def fixture_bed(tmp_path):
    bed = Bed(tmp_path)
    yield bed
    bed.close()


def test_the_late_news_of_a_lost_call_is_not_taken_for_the_connection_that_came_after_it(bed):
    """gRPC's callback has ended the calls, and Open(resume) gets the intake's lock before their news does."""
    bed.open(streams=2, **LINK)
    receiver = bed.intake.receiver()
    lost = [receiver.begin_stream(lambda: None) for _ in range(2)]
    for stream in lost:
        receiver.end_stream(stream)
    bed.open(streams=2, resume=True, **LINK)
    receiver.begin_stream(lambda: None)
    for stream in lost:
        bed.intake.stream_ended(receiver, stream, StreamEnd("the page stream was cut"))
    assert bed.intake._machine.phase is DestPhase.RECEIVING
    bed.intake.receiver().begin_stream(lambda: None)


def test_a_call_of_the_connection_at_hand_is_still_missed(bed):
    bed.open(streams=2, **LINK)
    receiver = bed.intake.receiver()
    bed.open(streams=2, resume=True, **LINK)
    stream = receiver.begin_stream(lambda: None)
    receiver.end_stream(stream)
    bed.intake.stream_ended(receiver, stream, StreamEnd("the page stream was cut"))
    assert bed.intake._machine.phase is DestPhase.LINK_LOST


class Context:
    """A call as gRPC shows it; `end` is what gRPC does when the connection is gone."""

    def __init__(self):
        self._callbacks, self._active = [], True

    def add_callback(self, callback):
        self._callbacks.append(callback)
        return True

    def is_active(self):
        return self._active

    def cancel(self):
        pass

    def abort(self, code, details):
        raise RuntimeError(details)

    def end(self):
        self._active = False
        for callback in self._callbacks:
            callback()


@pytest.mark.parametrize("stored", [0, 1], ids=["before its stream is known", "amid its stream"])
def test_a_connection_that_breaks_while_a_chunk_is_at_hand_is_a_lost_link_not_a_refused_chunk(bed, stored):
    bed.open(**LINK)
    receiver, context, told = bed.intake.receiver(), Context(), threading.Event()
    heard = bed.intake.stream_ended
    started = threading.Event()

    def stream_ended(*arguments):
        assert started.wait(PATIENCE_S)  # the news is taken when the generator has ended
        heard(*arguments)
        told.set()

    def messages():
        for sequence in range(stored):
            yield chunk(receiver, KEY, 3, sequence)
        context.end()
        yield chunk(receiver, KEY, 3, stored)

    bed.intake.stream_ended = stream_ended
    list(MigrationServicer(bed.intake, Arrivals(bed.events)).Pages(messages(), context))
    started.set()
    assert told.wait(PATIENCE_S)
    assert bed.intake._machine.phase is DestPhase.LINK_LOST, bed.intake._machine.abort_reason
    assert receiver.stored_chunks == stored


def test_a_chunk_of_a_call_that_is_over_is_not_stored(bed):
    bed.open(**LINK)
    receiver = bed.intake.receiver()
    stream = bed.store()
    receiver.end_stream(stream)
    with pytest.raises(StreamOver, match="a call that is over"):
        receiver.store(stream, chunk(receiver, KEY, 4, 1))
    assert receiver.stored_chunks == 1
