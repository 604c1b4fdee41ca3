"""A page stream's messages are taken out of gRPC one ahead of the one that is being stored, and no further."""

import threading

import grpc
import pytest

from dest_node.servicer import one_ahead

PATIENCE_S = 20


class Messages:
    """What gRPC's iterator is to the servicer: says when it is asked, and may wait or fail."""

    def __init__(self, count, *, error=None):
        self.asked = 0
        self.was_asked = threading.Semaphore(0)
        self._count = count
        self._error = error

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        self.was_asked.release()
        if self.asked <= self._count:
            return b"%d" % self.asked
        if self._error is not None:
            raise self._error
        raise StopIteration


def test_the_next_message_is_asked_for_while_one_is_being_used():
    messages = Messages(2)
    taken = one_ahead(messages)
    assert next(taken) == b"1"
    for _ in range(2):
        assert messages.was_asked.acquire(timeout=PATIENCE_S), "nobody asks before the first one is done with"
    assert list(taken) == [b"2"]


def test_all_come_in_order_and_exactly_one_is_ahead():
    messages = Messages(200)
    taken, ahead = [], []
    for message in one_ahead(messages):
        taken.append(message)
        while messages.asked <= len(taken):
            assert messages.was_asked.acquire(timeout=PATIENCE_S)
        ahead.append(messages.asked - len(taken))
    assert taken == [b"%d" % number for number in range(1, 201)]
    assert set(ahead) == {1}


def test_a_connection_that_goes_is_told_after_what_came_before():
    taken = one_ahead(Messages(2, error=grpc.RpcError("gone")))
    assert [next(taken), next(taken)] == [b"1", b"2"]
    with pytest.raises(grpc.RpcError, match="gone"):
        next(taken)


def test_a_reader_that_gives_up_leaves_no_thread_once_the_call_is_over():
    asked, over = threading.Event(), threading.Event()
    threads = []

    def call():
        yield b"1"
        threads.append(threading.current_thread())
        asked.set()
        assert over.wait(PATIENCE_S)

    taken = one_ahead(call())
    assert next(taken) == b"1"
    assert asked.wait(PATIENCE_S)
    taken.close()  # a chunk was refused: this does not wait for the call
    (thread,) = threads
    assert thread.is_alive()
    over.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
