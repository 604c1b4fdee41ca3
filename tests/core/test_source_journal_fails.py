"""A source whose journal fails while an attempt turns back: the guest that stays is left as it was before."""

import sqlite3
from types import SimpleNamespace

import pytest

from host.agent_link import Hello
from host.journal import Journal
from migration import events as told
from migration.identity import AttemptKey
from migration.rounds import Limits
from source_node import shell
from source_node.migration_run import MigrationRun
from source_node.order import Order

RUNNING = Hello(1, "ballast", "running", 1, 64, 0, 0, 0, False, 0, {}, 1, True)


class Destination:
    """Answers Open; hears nothing else."""

    incarnation = "i"

    def __init__(self, address, key, post, **_):
        self._post = post

    def open(self, *_):
        self._post(told.DestinationOpened("i"))

    def close(self):
        pass


@pytest.fixture
def guest_told(tmp_path, monkeypatch):
    """What a guest is told by a migration that is cancelled while it hints, on a disk that is full by then."""
    said = []
    monkeypatch.setattr(shell, "Destination", Destination)
    monkeypatch.setattr(
        shell.SourceShell, "_start_tracking", lambda self: self._post(told.TrackingStarted(None))
    )
    monkeypatch.setattr(shell.SourceShell, "byte_counts", lambda _: {})
    with Journal(tmp_path / "journal") as journal:
        move = journal.move

        def full(key, role, expected, to, **fields):
            if to == "ABORTED":
                raise sqlite3.OperationalError("database or disk is full")
            return move(key, role, expected, to, **fields)

        monkeypatch.setattr(journal, "move", full)

        def open_hints():
            said.append("hint")
            run._shell.throttle.set(99)
            run._events.put(told.CancelRequested("cancelled by the user"))
            return 2

        link = SimpleNamespace(throttle=lambda percent: said.append(f"throttle {percent}"))
        guest = SimpleNamespace(
            ram=SimpleNamespace(pages=64, memory_bytes=64 << 12), scanner=None, link=link,
            hello=lambda: RUNNING, found_again=lambda: True, listen_for_loss=lambda _: None,
        )  # fmt: skip
        host = SimpleNamespace(
            journal=journal, guest=guest, trust=None,
            events=SimpleNamespace(add=lambda name, **fields: ended.update({name: fields})),
            points=SimpleNamespace(reach=lambda _: None), hints=SimpleNamespace(listen=lambda _: None),
            balloon=SimpleNamespace(open_hints=open_hints, hints_done=lambda: said.append("done")),
            resources=SimpleNamespace(fields=dict),
        )  # fmt: skip
        ended = {}
        order = Order(
            key=AttemptKey("m", 1, 1), dest_address="127.0.0.1:1", skip=told.Skip.BOTH, tracker="uffd",
            tracker_reason="", integrity="full", hint_wait_ms=60_000,
            limits=Limits(),
        )  # fmt: skip
        run = MigrationRun(host, order, lambda: None)
        run.start()
        run.join(20)
        assert run.ended
        said.append(ended["migration_ended"])
    return said


def test_a_guest_whose_abort_cannot_be_recorded_is_neither_throttled_nor_without_its_hinted_pages(guest_told):
    *said, ended = guest_told
    assert said == ["hint", "throttle 99", "throttle 0", "done"]
    assert (ended["outcome"], ended["missing"]) == ("failed", [])
    assert "disk is full" in ended["reason"]
