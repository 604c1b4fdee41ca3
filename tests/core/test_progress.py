"""What is told while runs are under way: a line that fits at a terminal, JSON elsewhere."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from testbed.history import Event
from testbed.run import progress
from testbed.run.progress import FittedProgress, Speedometer, TerminalLines, display
from testbed.run.steps import Steps

FINISHED = SimpleNamespace(result=SimpleNamespace(outcome="completed", verdict="valid", total_ms=1350.0))
IN_ROUND_2 = {
    "round": 2, "sent_pages": 350, "zero_pages": 0, "skipped_pages": 400, "remaining_pages": 250,
    "payload_bytes": 350 << 12, "dirty_pages_per_s": 500.0, "expected_downtime_ms": 82.5, "eta_ms": 1234.0,
}  # fmt: skip


def test_the_speed_is_that_since_the_last_report():
    speed = Speedometer()
    assert speed.rate_bytes_per_s(1_000_000_000, 500) == 0.0
    assert speed.rate_bytes_per_s(1_500_000_000, 1500) == 2000.0


def at_a_terminal(width):
    return FittedProgress(Console(file=io.StringIO(), width=width, record=True))


def printed(shown):
    shown.console.print(shown.make_tasks_table(shown.tasks))
    return [line.rstrip() for line in shown.console.export_text().splitlines()]


def test_progress_shows_round_pages_and_time_left():
    shown = at_a_terminal(200)
    show = TerminalLines(shown).begin("hint")
    show(Event(1, "testbed", "run_started", {}))
    assert shown.tasks[0].fields["step"] == "starting two hosts"
    show(Event(2, "source", "round_started", {"round": 1, "candidate_pages": 1000}))
    for at_ns, sent in ((10**9, 100), (2 * 10**9, 350)):
        fields = {"round": 1, "sent_pages": sent, "zero_pages": 0, "skipped_pages": 400}
        fields |= {"remaining_pages": 600 - sent, "payload_bytes": sent * 4096, "eta_ms": 1000.0}
        show(Event(at_ns, "source", "progress", fields))
    task = shown.tasks[0]
    assert (task.completed, task.total) == (750, 1000)
    assert printed(shown)[0].endswith(" 75% round 1 0.98 MiB/s, 0.98 MiB left, over in at least 1.00 s")


def in_round_2(shown, label):
    show = TerminalLines(shown).begin(label)
    show(Event(2, "source", "round_started", {"round": 2, "candidate_pages": 1000}))
    show(Event(10**9, "source", "progress", IN_ROUND_2 | {"payload_bytes": 0}))
    show(Event(2 * 10**9, "source", "progress", IN_ROUND_2))


RATE, DIRTIES = "1.37 MiB/s, ", "dirties 1.95 MiB/s, "
LEFT, DOWNTIME, ETA = "0.98 MiB left, ", "downtime about 82.5 ms, ", "over in about 1.23 s"


@pytest.mark.parametrize(
    ("width", "bar", "detail"),
    [
        (134, True, RATE + LEFT + DIRTIES + DOWNTIME + ETA),
        (133, False, RATE + LEFT + DIRTIES + DOWNTIME + ETA),
        (109, False, RATE + LEFT + DIRTIES + DOWNTIME + ETA),
        (108, False, LEFT + DIRTIES + DOWNTIME + ETA),
        (80, False, LEFT + DOWNTIME + ETA),
        (60, False, LEFT + ETA),
        (20, False, ""),
    ],
)
def test_a_line_leaves_out_first_the_bar_then_the_rate_and_never_the_percentage(width, bar, detail):
    shown = at_a_terminal(width)
    in_round_2(shown, "hint")
    (told,) = printed(shown)
    gauge = f"{'━' * 18:24} " if bar else ""  # three quarters; the rest is a matter of colour
    assert told == f"hint {gauge} 75% round 2 {detail}".rstrip()


def test_a_long_name_is_shortened_before_the_percentage_is():
    shown = at_a_terminal(40)
    in_round_2(shown, "kv-only-memory-64MiB-records-20000-streams-4")
    in_round_2(shown, "kv-only")
    long, short = printed(shown)
    assert long.startswith("kv-only-memory-64MiB-")
    assert "…" in long
    assert long.endswith("  75% round 2")
    assert short.index("75%") == long.index("75%")
    assert 36 <= len(long) <= 40


def test_a_finished_run_stands_beside_one_under_way_on_80_columns():
    shown = at_a_terminal(80)
    lines = TerminalLines(shown)
    lines.begin("none")
    lines.finish("none", FINISHED)
    in_round_2(shown, "zero")
    done, under_way = printed(shown)
    assert done.startswith("none 100% ✓ completed in 1.35 s")
    assert done.endswith("proof valid")
    assert under_way.startswith("zero  75% round 2")


RUN = (
    ("testbed", "run_started", {"run": "0a"}),
    ("dest", "node_described", {}),
    ("source", "guest_ready", {}),
    ("source", "node_described", {}),
    ("testbed", "migration_requested", {"attempt": 1}),
    ("source", "hints_opened", {"round": 1}),
    ("source", "progress", IN_ROUND_2),
    ("testbed", "migration_retried", {"attempt": 2, "pause_ms": 500, "reason": "the link stayed lost"}),
    ("testbed", "migration_requested", {"attempt": 2}),
    ("source", "hints_opened", {"round": 1}),
    ("source", "guest_paused", {}),
    ("dest", "prepared", {}),
    ("dest", "committed", {}),
    ("dest", "guest_running", {}),
    ("source", "committed", {}),
    ("dest", "guest_ready", {}),
    ("testbed", "guest_checked", {}),
)  # fmt: skip


def test_a_step_is_told_once_and_none_goes_back():
    steps = Steps()
    told = [steps.begun(Event(at_ns, *event)) for at_ns, event in enumerate(RUN)]
    assert [step for step in told if step] == [
        "starting two hosts",
        "the guest boots",
        "the guest settles",
        "setting up",
        "asking the guest for its free pages",
        "waiting for the next attempt",
        "setting up",
        "asking the guest for its free pages",
        "switching over",
        "the destination has the whole guest",
        "the guest runs at the destination",
        "the guest runs on; both memories are hashed",
        "collecting the evidence",
    ]


def test_elsewhere_every_event_is_told(monkeypatch):
    piped = io.StringIO()
    monkeypatch.setattr("sys.stderr", piped)
    with display() as shown:
        show = shown.begin("hint")
        for at_ns, event in enumerate(RUN):
            show(Event(at_ns, *event))
        shown.finish("hint", FINISHED)
    documents = [json.loads(line) for line in piped.getvalue().splitlines()]
    assert [document["name"] for document in documents] == [name for _, name, _ in RUN] + ["judged"]
    assert documents[0] == {
        "run": "hint", "at_ns": 0, "origin": "testbed", "name": "run_started", "fields": {"run": "0a"},
    }  # fmt: skip


def test_a_terminal_has_a_line_a_run(monkeypatch):
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=True))
    with display() as shown:
        assert isinstance(shown, TerminalLines)
