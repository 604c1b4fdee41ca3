"""A guest goes from a to b, back to a, and on to c, as one scenario: every leg is proved by itself."""

import json

import psutil

from tests.live.runs import TINY, perform, scenario

LEGS = """
[balloon]
num_pages = 768
[[leg]]
to = "b"
[[leg]]
to = "a"
skip = "zero"
[[leg]]
to = "c"
settle = "100ms"
"""


def test_there_and_back_and_on_to_a_third_host(tmp_path):
    seen = {}

    def watch(event):
        """The memory of the first host's agent, while it holds no guest."""
        if event.name == "standing_by":
            agent = next(e for e in started if e.fields["process"] == f"{event.origin}-agent")
            maps = psutil.Process(agent.fields["pid"]).memory_maps(grouped=False)
            seen[event.origin] = [one.path for one in maps if "memfd:ballast" in one.path]
        elif event.name == "process_started":
            started.append(event)

    started = []
    run = perform(tmp_path, scenario(text=TINY + LEGS), watch)
    result = run.result.to_dict()
    assert (result["outcome"], result["verdict"]) == ("completed", "valid"), result["reasons"]
    legs = result["legs"]
    assert [(leg["from"], leg["to"], leg["outcome"], leg["verdict"]) for leg in legs] == [
        ("a", "b", "completed", "valid"), ("b", "a", "completed", "valid"), ("a", "c", "completed", "valid"),
    ]  # fmt: skip
    for leg in legs:
        assert leg["balloon"]["num_pages"] == leg["balloon"]["actual"] == 768
        assert leg["guest"]["ballooned_pages_at_start"] == 768
        assert leg["integrity"]["mismatches"] == 0
        assert leg["integrity"]["compared_pages"] == leg["guest"]["pages"]
        assert leg["balloon"]["stats"]["memtot"] > 0
        assert leg["guest_blackout_ms"] > 0
    # Hints are given by the same driver on its first and on its third host.
    assert legs[0]["hints"]["skipped_pages"] > 1000
    assert legs[1]["hints"]["skipped_pages"] == 0
    assert legs[2]["hints"]["skipped_pages"] > 1000
    assert result["total_ms"] == legs[2]["total_ms"]
    # Whoever gave the guest away let go of its memory before the next leg.
    assert seen == {"source": [], "dest": []}
    owners = [json.loads(line) for line in run.run_dir.events.read_text().splitlines()]
    final = {e["fields"]["host"]: e["fields"]["state"] for e in owners if e["name"] == "final_status"}
    assert final == {"source": "frozen", "dest": "standby", "third": "paused"}


def test_a_fault_of_the_second_leg_comes_there(tmp_path):
    pause = 'kind = "pause"\nwhat = "dest_node"\nat = "prepare.sent"\nleg = 2\nfor = "100ms"\n'
    run = perform(tmp_path, scenario(text=TINY + f'[[leg]]\nto = "b"\n[[leg]]\nto = "a"\n[[fault]]\n{pause}'))
    assert (run.result.outcome, run.result.verdict) == ("completed", "valid"), run.judgement.reasons
    (came,) = run.result.faults
    assert (came.leg, came.host, came.at) == (2, "source", "prepare.sent"), "b is the giver there"
    assert [len(leg["faults"]) for leg in run.result.legs] == [0, 1]
