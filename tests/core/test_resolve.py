"""What an operator may decide about an attempt whose other side is dead: every pair of journal states."""

import pytest

from host.journal import Entry, Journal, read_entries
from migration.identity import AttemptKey
from testbed.standing.resolve import ResolveRefusedError, Ruling, of_dead_dest, of_dead_source

KEY = AttemptKey("m", 1, 1)
SOURCE_STATES = (None, "STARTED", "COMMITTING", "COMPLETED", "ABORTED")
DEST_STATES = (None, "RECEIVING", "PREPARED", "COMMITTED", "ABORTED")


def entry(role, state, digest=255):
    return None if state is None else Entry(KEY, role, state, digest, "", 0)


def dead_source(source, dest, unreadable=""):
    try:
        return of_dead_source(entry("source", source), entry("dest", dest), unreadable).verdict
    except ResolveRefusedError:
        return "refused"


def dead_dest(source, dest, *, alive="", unreadable="", fenced=""):
    try:
        return of_dead_dest(
            entry("source", source), entry("dest", dest), alive=alive, unreadable=unreadable, fenced=fenced
        ).verdict
    except ResolveRefusedError:
        return "refused"


def test_without_its_source_a_guest_runs_only_where_nobody_else_will_run_it():
    for source in SOURCE_STATES:
        for dest in DEST_STATES:
            said = dead_source(source, dest)
            if dest == "COMMITTED":
                assert said == "COMMITTED"
            elif dest == "PREPARED":
                wanted = {"COMMITTING": "COMMITTED", "ABORTED": "ABORTED"}
                assert said == wanted.get(source, "refused"), source
            else:
                assert said == "refused", (source, dest)


def test_what_is_missing_is_said():
    with pytest.raises(
        ResolveRefusedError, match="says STARTED, not COMMITTING: a source that is started again"
    ):
        of_dead_source(entry("source", "STARTED"), entry("dest", "PREPARED"))
    with pytest.raises(ResolveRefusedError, match=r"does not prove .*: the disk is gone"):
        of_dead_source(None, entry("dest", "PREPARED"), "the disk is gone")
    with pytest.raises(ResolveRefusedError, match="another image"):
        of_dead_source(entry("source", "COMMITTING", 1), entry("dest", "PREPARED", 2))


def test_the_image_that_is_committed_is_the_one_that_both_name():
    ruling = of_dead_source(entry("source", "COMMITTING", 7), entry("dest", "PREPARED", 7))
    assert ruling == Ruling("COMMITTED", "the source's journal says COMMITTING", 7)


def test_without_its_destination_a_guest_comes_back_unless_it_was_there():
    for source in SOURCE_STATES:
        for dest in DEST_STATES:
            said = dead_dest(source, dest)
            if source == "ABORTED":
                assert said == "ABORTED", "done already"
            elif source == "COMMITTING":
                assert said == ("COMMITTED" if dest == "COMMITTED" else "ABORTED"), dest
            else:
                assert said == "refused", (source, dest)


def test_silence_is_no_proof_of_death_and_nobody_can_say_so():
    assert dead_dest("COMMITTING", "PREPARED", alive="its node runs", fenced="I am sure") == "refused"
    assert dead_dest("COMMITTING", None, unreadable="no such file") == "refused"
    assert dead_dest("COMMITTING", None, unreadable="no such file", fenced="power is off") == "ABORTED"
    ruling = of_dead_dest(
        entry("source", "COMMITTING"), None, alive="", unreadable="no such file", fenced="power is off"
    )
    assert "power is off" in ruling.why


def test_a_dead_destinations_attempt_is_burned_in_its_own_journal():
    burned = of_dead_dest(
        entry("source", "COMMITTING"), entry("dest", "PREPARED"), alive="", unreadable="", fenced=""
    )
    lost = of_dead_dest(
        entry("source", "COMMITTING"), entry("dest", "COMMITTED"), alive="", unreadable="", fenced=""
    )
    assert (burned.burns, lost.burns) == (True, False)


def test_a_journal_can_be_read_while_its_node_has_it(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal(path) as journal:
        journal.begin(KEY, "dest", "PREPARED", digest=5)
        assert [one.state for one in read_entries(path, "dest")] == ["PREPARED"]
        assert read_entries(path, "source") == []
    assert [one.digest for one in read_entries(path, "dest")] == [5]
    with pytest.raises(OSError, match="cannot be read as a journal"):
        read_entries(tmp_path / "none.sqlite", "dest")
