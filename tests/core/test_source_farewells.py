"""An Abort that was not heard is said again: in the background, and before the next attempt opens that destination.

A destination that prepared an image keeps it, and refuses other migrations, until it hears of the end.
"""

from types import SimpleNamespace

import pytest

from host.journal import Journal
from migration import commands as do
from migration.identity import AttemptKey
from migration.rounds import Limits
from source_node import farewells, shell
from source_node.attempt_note import AttemptNote
from source_node.farewells import UNHEARD_MAX, Farewells, mark, tell_all, unheard
from source_node.order import Order

B, C = "127.0.0.1:1", "127.0.0.1:2 c.run"


class Peers:
    """Destinations in words: `said` is what reached them, in order; those in `deaf` answer nobody."""

    def __init__(self):
        self.said, self.deaf, self.calls = [], set(), 0
        self.when_called = lambda: None

    def __call__(self, address, key, post, *, server_name="", trust=None):
        return SimpleNamespace(
            abort=lambda _: self._tell(address, f"abort {key.migration}"),
            forget=lambda: self._tell(address, f"forget {key.migration}"),
            open=lambda *_: self._tell(address, f"open {key.migration}"),
            close=lambda: None,
        )

    def _tell(self, address, words):
        self.calls += 1
        self.when_called()
        if address in self.deaf:
            return "unavailable"
        self.said.append(words)
        return ""


@pytest.fixture
def peers(monkeypatch):
    made = Peers()
    monkeypatch.setattr(farewells, "Destination", made)
    monkeypatch.setattr(shell, "Destination", made)
    return made


@pytest.fixture
def host(tmp_path):
    told = []
    with Journal(tmp_path / "journal") as journal:
        yield SimpleNamespace(
            journal=journal,
            told=told,
            trust=None,
            points=SimpleNamespace(reach=lambda _: None),
            guest=SimpleNamespace(ram=SimpleNamespace(memory_bytes=1 << 20), scanner=None),
            events=SimpleNamespace(add=lambda name, **_: told.append(name)),
        )


def ended(host, migration, state="ABORTED", peer=B):
    key, note = AttemptKey(migration, 1, 1), AttemptNote(peer, "because").text
    host.journal.begin(key, "source", state, detail=note)
    return key


def order(migration, address):
    name, _, server = address.partition(" ")
    return Order(
        key=AttemptKey(migration, 1, 1), dest_address=name, dest_server_name=server, skip="none", tracker="hash",
        tracker_reason="", integrity="full", hint_wait_ms=0, limits=Limits(),
    )  # fmt: skip


def open_destination(host, migration, address):
    asked = order(migration, address)
    one = shell.SourceShell(host, asked, SimpleNamespace(phase=None), post=print, post_first=print)
    one._carry_out(do.OpenDestination(asked.key))


def over(one):
    """Whether its thread ended; it takes itself out as the last thing that it does."""
    if (thread := one._thread) is not None:
        thread.join(10)
    return one._thread is None


def test_an_unheard_abort_is_repeated_before_the_next_open_to_that_address(host, peers):
    ended(host, "first")
    ended(host, "elsewhere", peer=C)
    ended(host, "known")
    mark(host, AttemptKey("known", 1, 1), heard=True)
    open_destination(host, "second", B)
    assert peers.said == ["abort first", "open second"]
    open_destination(host, "third", B)
    assert peers.said[2:] == ["open third"], "what was heard is not said again"
    assert [entry.key.migration for entry in unheard(host)] == ["elsewhere"]


def test_an_abort_that_is_unheard_again_stays_remembered_and_costs_one_call(host, peers):
    for number in range(5):
        ended(host, f"m{number}")
    peers.deaf = {"127.0.0.1:1"}
    assert len(tell_all(host, unheard(host, B))) == 5
    assert peers.calls == 1, "who does not answer is not asked once for every attempt"
    peers.deaf.clear()
    assert tell_all(host, unheard(host, B)) == []
    assert peers.said == [f"abort m{number}" for number in range(5)]


def test_what_is_remembered_is_bounded_and_the_newest(host):
    for number in range(UNHEARD_MAX + 3):
        ended(host, f"m{number}")
    kept = unheard(host)
    assert (len(kept), kept[0].key.migration) == (UNHEARD_MAX, "m3")


def test_the_background_tells_until_the_destination_answers(host, peers, monkeypatch):
    monkeypatch.setattr(farewells, "PAUSE_S_FIRST", 0.0)
    monkeypatch.setattr(farewells, "PAUSE_S_MAX", 0.0)
    ended(host, "given up")
    ended(host, "gave away", "COMPLETED")
    peers.deaf = {"127.0.0.1:1"}
    peers.when_called = lambda: peers.calls < 4 or peers.deaf.clear()
    one = Farewells(host)
    one.begin()
    assert over(one)
    assert peers.said == ["abort given up", "forget gave away"]
    assert unheard(host) == []
    assert host.told.count("abort_unheard") == 1, "it is told once that nobody heard, not at every try"
    assert host.told.count("outcome_heard") == 2


def test_news_are_not_missed_by_a_thread_that_is_about_to_end(host, peers):
    one = Farewells(host)
    ended(host, "first")
    assert [entry.key.migration for entry in one._waiting()] == ["first"]
    tell_all(host, unheard(host))
    one._thread = SimpleNamespace(is_alive=lambda: True)  # it has found nobody left, and has not returned yet
    assert one._waiting() == []
    ended(host, "second")
    one.begin()
    assert over(one)
    assert peers.said == ["abort first", "abort second"]


def test_who_stops_tells_nobody_more(host, peers):
    ended(host, "first")
    one = Farewells(host)
    one.stop(1)
    one.begin()
    assert (one._thread, peers.calls) == (None, 0)
