"""Run directories, the history, and what is read back from them."""

import json
import threading

import numpy as np
import pytest

from guest_agent.oracle import ORACLE_RECORD, expectations
from testbed.errors import RecordError
from testbed.history import History
from testbed.record import run_dir as run_dirs
from testbed.record.beats import BEAT, blackout_ns, read_beats
from testbed.record.oracle_log import last_versions, read_logs
from testbed.record.run_record import load
from testbed.record.testing import SyntheticRun


def test_a_run_directory_is_never_shared_or_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dirs, "utc_stamp", lambda: "20300101T000000Z")
    made = [run_dirs.create(tmp_path, "demo", 7) for _ in range(3)]
    assert [one.path.name for one in made] == [
        "20300101T000000Z-7",
        "20300101T000000Z-7.2",
        "20300101T000000Z-7.3",
    ]
    assert (tmp_path / "demo" / "latest").resolve() == made[-1].path


def test_documents_appear_whole_and_leave_nothing_beside(tmp_path):
    run_dirs.write_json(tmp_path / "a.json", {"schema": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"schema": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_history_is_on_disk_before_subscribers_hear_of_it(tmp_path):
    history = History(tmp_path / "events.jsonl")
    lines_seen = []
    history.subscribe(lambda _: lines_seen.append((tmp_path / "events.jsonl").read_text().count("\n")))
    history.note("one")
    history.record("source", "two", {"at_ns": 5, "name": "fields may be called anything"}, 17)
    history.close()
    assert lines_seen == [1, 2]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert last == {
        "at_ns": 17,
        "origin": "source",
        "name": "two",
        "fields": {"at_ns": 5, "name": "fields may be called anything"},
    }


def test_waiting_sees_what_came_before_and_what_comes_later(tmp_path):
    history = History(tmp_path / "events.jsonl")
    history.note("early", number=1)
    early = history.wait_for(lambda event: event.name == "early", 0)
    assert early is not None
    assert early.fields == {"number": 1}
    thread = threading.Thread(target=lambda: history.note("late"))
    thread.start()
    assert history.wait_for(lambda event: event.name == "late", 10) is not None
    thread.join()
    assert history.wait_for(lambda event: event.name == "never", 0.01) is None
    history.close()


def test_recording_from_a_signal_handler_cannot_deadlock(tmp_path):
    """The handler runs on the thread that may be inside the history at that moment."""
    history = History(tmp_path / "events.jsonl")

    def matches(event):
        if event.name == "outer":
            history.note("inner")
        return event.name == "inner"

    history.note("outer")
    assert history.wait_for(matches, 10) is not None
    history.close()


def test_events_are_read_in_the_order_of_time(tmp_path):
    record = load(SyntheticRun(tmp_path).run_dir.path)
    assert [event.at_ns for event in record.events] == sorted(event.at_ns for event in record.events)


def test_a_torn_last_line_is_what_a_crash_leaves(tmp_path):
    run = SyntheticRun(tmp_path)
    before = len(load(run.run_dir.path).events)
    with run.run_dir.events.open("a") as file:
        file.write('{"at_ns": 1, "na')
    assert len(load(run.run_dir.path).events) == before


def test_a_damaged_line_in_the_middle_is_refused(tmp_path):
    run = SyntheticRun(tmp_path)
    run.run_dir.events.write_text("garbage\n" + run.run_dir.events.read_text())
    with pytest.raises(RecordError, match="line 1 is damaged"):
        load(run.run_dir.path)


@pytest.mark.parametrize("manifest", ["{}", "[1]", "{", '{"scenario": {"name": "x"}}'])
def test_a_damaged_manifest_is_refused(tmp_path, manifest):
    run = SyntheticRun(tmp_path)
    run.run_dir.manifest.write_text(manifest)
    with pytest.raises(RecordError, match="damaged"):
        load(run.run_dir.path)


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RecordError, match="is no run directory"):
        load(tmp_path)


def beats_at(*at_ms, epoch=1, first=1):
    beats = np.empty(len(at_ms), dtype=BEAT)
    beats["at_ns"], beats["guest_epoch"] = np.array(at_ms) * 1_000_000, epoch
    beats["beat"] = np.arange(first, first + len(at_ms))
    return beats


def test_the_blackout_of_a_switch_is_the_gap_between_the_hosts():
    window = (0, 100_000_000)
    assert blackout_ns(beats_at(1, 3, 50), beats_at(80, 82, epoch=2), window) == 30_000_000


def test_the_blackout_without_a_switch_is_the_longest_gap_inside_the_window():
    beats = beats_at(0, 40, 42, 57, 59, 200)
    assert blackout_ns(beats, beats_at(), (41_000_000, 60_000_000)) == 141_000_000
    assert blackout_ns(beats, beats_at(), (43_000_000, 58_000_000)) == 15_000_000
    assert blackout_ns(beats_at(1), beats_at(), (0, 1)) is None


def test_the_blackout_knows_what_earlier_attempts_cost_the_guest():
    """The first attempt held the guest still for 300 ms and gave up; the second one switched within 30 ms."""
    source, dest = beats_at(0, 2, 302, 304, 400, 402), beats_at(432, 434, epoch=2)
    last = (350_000_000, 440_000_000)
    assert blackout_ns(source, dest, last) == 30_000_000
    assert blackout_ns(source, dest, last, (1_000_000, 350_000_000)) == 300_000_000
    assert blackout_ns(source, beats_at(), last, (1_000_000, 350_000_000)) == 300_000_000


def test_torn_records_are_dropped(tmp_path):
    path = tmp_path / "beats"
    path.write_bytes(beats_at(1, 2, 3).tobytes()[:-5])
    assert read_beats(path)["beat"].tolist() == [1, 2]
    assert len(read_beats(tmp_path / "missing")) == 0


def test_only_last_versions_are_asked_for_and_they_mean_the_same(tmp_path):
    log = np.array(
        [(1, 1, 5, 1), (2, 1, 5, 9), (1, 1, 5, 2), (1, 2, 5, 7), (1, 1, 6, 1), (1, 1, 5, 3)],
        dtype=ORACLE_RECORD,
    )
    (tmp_path / "a").write_bytes(log[:4].tobytes() + b"torn")
    (tmp_path / "b").write_bytes(log[4:].tobytes())
    whole = read_logs([tmp_path / "a", tmp_path / "b", tmp_path / "missing"])
    assert whole == log.tobytes()
    short = last_versions(whole)
    assert len(short) // ORACLE_RECORD.itemsize == 4
    expected, got = expectations(whole), expectations(short)
    assert {key: (items.tolist(), versions.tolist()) for key, (items, versions) in got.items()} == {
        key: (items.tolist(), versions.tolist()) for key, (items, versions) in expected.items()
    }
    assert last_versions(b"") == b""
