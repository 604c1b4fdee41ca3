"""The journal is durable, exclusive, and refuses every transition that the caller did not expect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.errors import JournalConflict, JournalLocked
from host.journal import AttemptKey, Journal

KEY = AttemptKey("m", 1, 7)
HOLD = """
import sys
from host.journal import AttemptKey, Journal
with Journal(sys.argv[1]) as journal:
    journal.begin(AttemptKey("m", 1, 7), "dest", "PREPARED")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "journal.sqlite") as opened:
        yield opened


def test_an_attempt_moves_only_from_a_state_that_was_expected(journal):
    journal.begin(KEY, "dest", "OPEN")
    journal.move(KEY, "dest", {"OPEN"}, "PREPARED", digest=2**64 - 1)
    with pytest.raises(JournalConflict, match="expected OPEN, found PREPARED"):
        journal.move(KEY, "dest", {"OPEN"}, "COMMITTED")
    assert journal.get(KEY, "dest").state == "PREPARED"
    entry = journal.move(KEY, "dest", {"PREPARED", "OPEN"}, "COMMITTED", detail="asked")
    assert (entry.state, entry.digest, entry.detail) == ("COMMITTED", 2**64 - 1, "asked")
    assert journal.get(KEY, "dest") == entry


def test_no_expected_state_moves_nothing(journal):
    journal.begin(KEY, "dest", "OPEN")
    with pytest.raises(JournalConflict):
        journal.move(KEY, "dest", set(), "COMMITTED")


def test_another_guest_epoch_is_another_attempt(journal):
    journal.begin(KEY, "dest", "PREPARED")
    other = AttemptKey("m", 1, 8)
    assert journal.get(other, "dest") is None
    with pytest.raises(JournalConflict, match="PREPARED of epoch 7"):
        journal.move(other, "dest", {"PREPARED"}, "COMMITTED")
    with pytest.raises(JournalConflict, match="cannot begin"):
        journal.begin(other, "dest", "OPEN")
    assert not journal.forget(other, "dest")
    assert journal.get(KEY, "dest").state == "PREPARED"


def test_the_two_roles_do_not_see_each_other(journal):
    journal.begin(KEY, "source", "RUNNING")
    assert journal.get(KEY, "dest") is None
    journal.begin(KEY, "dest", "OPEN")
    assert journal.newest("source").state == "RUNNING"
    assert [entry.role for entry in journal.unfinished()] == ["source", "dest"]
    assert [entry.role for entry in journal.unfinished("dest")] == ["dest"]


def test_unknown_attempts_are_nothing_and_not_an_error_to_ask_for(journal):
    assert journal.get(KEY, "source") is None
    assert journal.newest("source") is None
    with pytest.raises(JournalConflict, match="found nothing"):
        journal.move(KEY, "source", {"RUNNING"}, "COMMITTING")


def test_outcomes_stay_until_forgotten(journal):
    journal.begin(KEY, "dest", "OPEN")
    journal.move(KEY, "dest", {"OPEN"}, "ABORTED")
    assert journal.unfinished() == []
    assert journal.newest("dest").state == "ABORTED"
    assert journal.forget(KEY, "dest")
    assert journal.newest("dest") is None


def test_everything_is_there_after_opening_again(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path, now_ns=lambda: 42) as first:
        first.begin(KEY, "source", "RUNNING")
        kept = first.move(KEY, "source", {"RUNNING"}, "COMMITTING", digest=5)
    with Journal(path) as second:
        assert second.get(KEY, "source") == kept
        assert kept.updated_ns == 42


def test_a_second_process_is_told_who_holds_the_journal(tmp_path):
    path = tmp_path / "journal.sqlite"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(JournalLocked, match=f"held by process {holder.pid}") as caught:
            Journal(path)
        assert caught.value.holder_pid == holder.pid
        holder.stdin.close()
    Journal(path).close()  # the lock ended with the process


def test_a_killed_process_leaves_its_records_and_no_lock(tmp_path):
    path = tmp_path / "journal.sqlite"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with Journal(path) as reopened:
        assert reopened.get(KEY, "dest").state == "PREPARED"


def test_a_failed_open_gives_the_lock_back(tmp_path):
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(Exception, match="not a database"):
        Journal(path)
    assert set(Path("/proc/self/fd").iterdir()) == before


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sets(st.sampled_from("ABC"), max_size=3), st.sampled_from("ABC")),
        max_size=12,
    )
)
def test_it_agrees_with_a_plain_variable(tmp_path_factory, steps):
    state = "A"
    with Journal(tmp_path_factory.mktemp("journal") / "j.sqlite") as journal:
        journal.begin(KEY, "dest", state)
        for expected, to in steps:
            if state in expected:
                state = journal.move(KEY, "dest", expected, to).state
                assert state == to
            else:
                with pytest.raises(JournalConflict):
                    journal.move(KEY, "dest", expected, to)
            assert journal.get(KEY, "dest").state == state
