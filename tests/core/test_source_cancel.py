"""What whoever wants a migration cancelled is answered: what came of the wish, at whatever moment it comes."""

import threading
from types import SimpleNamespace

import pytest

from host.agent_link import Hello
from host.journal import Journal
from migration import events as told
from migration.identity import AttemptKey
from migration.rounds import Limits
from source_node import migration_run, shell
from source_node.migration_run import MigrationRun
from source_node.order import Order

RUNNING = Hello(1, "ballast", "running", 1, 64, 0, 0, 0, False, 0, {}, 1, True)
KEY = AttemptKey("m", 1, 1)
WAIT_S = 20


class SilentDestination:
    """Is asked, and answers nothing."""

    def __init__(self, *_, **__):
        self.asked = asked

    def open(self, *_):
        self.asked.set()

    def abort(self, _):
        return ""

    def close(self):
        pass


asked = threading.Event()


@pytest.fixture(name="run")
def fixture_run(tmp_path, monkeypatch):
    """A migration that waits for its destination."""
    asked.clear()
    monkeypatch.setattr(shell, "Destination", SilentDestination)
    monkeypatch.setattr(shell.SourceShell, "byte_counts", lambda _: {})
    with Journal(tmp_path / "journal") as journal:
        guest = SimpleNamespace(
            ram=SimpleNamespace(pages=64, memory_bytes=64 << 12), scanner=None,
            link=SimpleNamespace(throttle=lambda _: None), hello=lambda: RUNNING, found_again=lambda: True,
            listen_for_loss=lambda _: None,
        )  # fmt: skip
        host = SimpleNamespace(
            journal=journal, guest=guest, trust=None, resources=SimpleNamespace(fields=dict),
            events=SimpleNamespace(add=lambda *_, **__: None), points=SimpleNamespace(reach=lambda _: None),
            hints=SimpleNamespace(listen=lambda _: None),
        )  # fmt: skip
        order = Order(
            key=KEY, dest_address="127.0.0.1:1", skip=told.Skip.NONE, tracker="uffd", tracker_reason="",
            integrity="full", hint_wait_ms=0, limits=Limits(),
        )  # fmt: skip
        one = MigrationRun(host, order, lambda: None)
        yield one
        if one._thread.ident is not None:
            one.cancel("the test ends")
            one.join(WAIT_S)


def test_a_wish_that_comes_before_the_first_step_is_no_wish_in_vain(run):
    run.start()
    assert run.cancel("at once") == (True, "OPENING")
    run.join(WAIT_S)
    assert run._shell.outcome.reason == "at once"


def test_the_answer_is_what_came_of_the_wish_and_not_what_was_true_when_it_was_made(run):
    """Two wishes, one behind the other: only the first ends the attempt."""
    first, second = migration_run.Wish("enough"), migration_run.Wish("too late")
    run._wishes.extend((first, second))
    run.start()
    assert first.answer.result(WAIT_S) == (True, "OPENING")
    assert second.answer.result(WAIT_S)[0] is False
    run.join(WAIT_S)
    assert run._shell.outcome.reason == "enough"
    assert run.cancel("after the end") == (False, "CANCELLED")


def test_a_wish_goes_before_the_facts_that_wait(run):
    wish = migration_run.Wish("enough")
    run._events.put(told.PeerLost("refused"))
    run._wishes.append(wish)
    run.start()
    assert wish.answer.result(WAIT_S) == (True, "OPENING")
    run.join(WAIT_S)
    assert run._shell.outcome.reason == "enough"


def test_a_thread_that_is_busy_holds_nobody_for_long_and_the_wish_is_not_lost(run, monkeypatch):
    monkeypatch.setattr(migration_run, "CANCEL_ANSWER_S", 0.01)
    held, free = threading.Event(), threading.Event()

    def hold(*_):
        held.set()
        assert free.wait(WAIT_S)

    monkeypatch.setattr(SilentDestination, "open", hold)
    run.start()
    assert held.wait(WAIT_S)
    assert run.cancel("meanwhile") == (True, "OPENING")
    free.set()
    run.join(WAIT_S)
    assert run._shell.outcome.outcome == "cancelled"
