"""What a restarted source still has to tell: to the testbed that an attempt ended, to the destination how."""

import json
import sqlite3
from types import SimpleNamespace

import pytest

from host.agent_link import Hello
from host.event_log import EventLog
from host.journal import Journal
from migration.identity import AttemptKey
from source_node.aftermath import tell_end
from source_node.attempt_note import AttemptNote
from source_node.farewells import mark
from source_node.recovery import untold

KEY = AttemptKey("m", 1, 1)


def hello(state, epoch=1):
    return Hello(1, "ballast", state, epoch, 64, 0, 0, 0, False, 0, {}, 1, True)


@pytest.fixture
def host(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        yield SimpleNamespace(journal=journal, events=EventLog("a"), guest=SimpleNamespace(ram=None))


def ended(host, state, reason=""):
    note = AttemptNote("127.0.0.1:1 b.run", reason)
    host.journal.begin(KEY, "source", "STARTED", detail=note.text)
    host.journal.move(KEY, "source", {"STARTED"}, state, detail=note.text)
    return untold(host.journal.entries("source"))


def told(host):
    host.events.close()
    return [json.loads(fact.fields_json) for fact in host.events.watch() if fact.name == "migration_ended"]


@pytest.mark.parametrize(
    ("agent", "outcome"),
    [
        (hello("running"), "failed"),
        (hello("paused"), "failed"),
        (hello("standby", 0), "guest_lost"),
        (hello("running", 3), "guest_lost"),  # another guest than the one of the attempt
    ],
)
def test_an_aborted_attempt_is_told_once_with_its_reason(host, agent, outcome):
    tell_end(host, ended(host, "ABORTED", "because"), agent)
    assert untold(host.journal.entries("source")) is None
    (event,) = told(host)
    assert (event["outcome"], event["reason"]) == (outcome, "because")
    assert event["told_after_restart"]


def test_a_completed_attempt_is_told_and_says_what_is_missing(host):
    tell_end(host, ended(host, "COMPLETED"), hello("frozen"))
    (event,) = told(host)
    assert (event["outcome"], event["artefacts"]) == ("completed", [])
    assert len(event["missing"]) == 2


def test_what_was_told_or_is_open_is_not_told_again(host):
    entry = ended(host, "ABORTED")
    mark(host, entry.key, told=True)
    assert untold(host.journal.entries("source")) is None
    host.journal.begin(AttemptKey("m", 2, 1), "source", "COMMITTING", detail=AttemptNote("x").text)
    assert untold(host.journal.entries("source")) is None
    assert untold([]) is None


def test_who_knows_is_added_up_and_starts_again_with_an_outcome(host):
    entry = ended(host, "ABORTED")
    mark(host, entry.key, told=True)
    mark(host, entry.key, heard=True)
    note = AttemptNote.read(host.journal.get(KEY, "source").detail)
    assert (note.told, note.heard, note.address) == (True, True, ("127.0.0.1:1", "b.run"))
    assert note.ended("again") == AttemptNote("127.0.0.1:1 b.run", "again")


def test_a_mark_moves_nothing_that_is_open(host):
    host.journal.begin(KEY, "source", "COMMITTING", detail=AttemptNote("x").text)
    mark(host, KEY, told=True)
    assert not AttemptNote.read(host.journal.get(KEY, "source").detail).told


def test_a_note_is_a_line_that_a_person_can_read(host, tmp_path):
    ended(host, "ABORTED", "the link was lost")
    with sqlite3.connect(tmp_path / "journal") as database:
        (text,) = database.execute("SELECT detail FROM attempts").fetchone()
    database.close()
    assert "the link was lost" in text
    assert "\n" not in text
