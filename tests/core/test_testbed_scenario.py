"""Scenarios: quantities are exact, every mistake is told at once with its path, names follow from what varies."""

from pathlib import Path

import pytest

from guest_agent.balloon_options import BalloonOptions
from testbed.errors import UsageError
from testbed.scenario.document import Freed, Scenario
from testbed.scenario.file import load, parse, parse_value, varied_name
from testbed.units import (
    format_bytes,
    format_ms,
    parse_bytes,
    parse_duration_ms,
    parse_page_rate,
    parse_pages,
    parse_rate,
)

SCENARIOS = Path(__file__).parents[2] / "scenarios"
GOOD = """
[guest]
memory = "64MiB"
[[guest.workload]]
name = "freed"
fraction = 0.7
[[guest.workload]]
name = "kv"
records = 100
operations_per_second = 10
"""


def problems_of(text, overrides=()):
    with pytest.raises(UsageError) as caught:
        parse(text, default_name="test", overrides=overrides)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        (parse_bytes, "2GiB", 2 << 30),
        (parse_bytes, "1.5 KiB", 1536),
        (parse_bytes, "64MB", 64_000_000),
        (parse_bytes, 4096, 4096),
        (parse_bytes, "4096", 4096),
        (parse_rate, "1Gbit/s", 125_000_000),
        (parse_rate, "12MiB/s", 12 << 20),
        (parse_rate, "unlimited", 0),
        (parse_duration_ms, "300ms", 300),
        (parse_duration_ms, "1.5s", 1500),
        (parse_duration_ms, "2min", 120_000),
        (parse_page_rate, "2000pages/s", 2000),
        (parse_pages, "128MiB", 32768),
        (parse_pages, 7, 7),
    ],
)
def test_a_quantity_is_held_in_its_base_unit(parser, text, expected):
    assert parser(text) == expected


@pytest.mark.parametrize(
    ("parser", "text", "complaint"),
    [
        (parse_bytes, "2 gibibytes", "not understood"),
        (parse_bytes, "0.3B", "whole number of bytes"),
        (parse_bytes, -1, "negative"),
        (parse_bytes, True, "no quantity"),
        (parse_bytes, 1.5, "no quantity"),
        (parse_rate, "1Gbit", "not understood"),
        (parse_duration_ms, "0.5ms", "whole number of milliseconds"),
        (parse_pages, "5KB", "whole number of 4096-byte pages"),
        (parse_page_rate, "5/s", "pages/s"),
    ],
)
def test_what_is_not_exact_is_refused(parser, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parser(text)


def test_sizes_and_durations_are_told_in_three_figures():
    assert [format_bytes(count) for count in (0, 999, 2048, 768 << 20, 3 << 30)] == [
        "0 B", "999 B", "2.00 KiB", "768 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [format_ms(ms) for ms in (0.5, 41, 99.97, 2970)] == ["0.50 ms", "41.0 ms", "100 ms", "2.97 s"]


def test_a_scenario_has_its_file_s_name_and_defaults():
    scenario = parse(GOOD, default_name="tiny")
    assert scenario.name == "tiny"
    assert scenario.guest.memory == 64 << 20
    assert scenario.migration.skip == "both"
    assert scenario.expect == "completed"
    assert isinstance(scenario.guest.workload[0], Freed)


def test_a_scenario_survives_its_manifest():
    scenario = parse(GOOD, default_name="tiny")
    assert Scenario.model_validate(scenario.model_dump(mode="json")) == scenario


def test_every_problem_is_told_at_once_with_its_path():
    text = """
    sed = 3
    expect = "done"
    [guest]
    memory = "17MiB"
    [[guest.workload]]
    name = "freed"
    fraction = 1.7
    kep = 1
    [[guest.workload]]
    name = "wrter"
    [[guest.workload]]
    rate = 1
    [[guest.workload]]
    name = "kv"
    records = "many"
    [migration]
    tracker = "hash"
    skip = "hint"
    downtime_limit = "3 parsecs"
    timeot = "3s"
    """
    problems = problems_of(text, overrides=["guest.workload.9.fraction=0.3", "foo"])
    starts = {problem.split(":")[0] for problem in problems}
    assert starts == {
        "sed",
        "expect",
        "guest.memory",
        "guest.workload.0.fraction",
        "guest.workload.0.kep",
        "guest.workload.1.name",
        "guest.workload.2.name",
        "guest.workload.3.records",
        "guest.workload.3.operations_per_second",
        "migration.tracker",
        "migration.downtime_limit",
        "migration.timeot",
        "guest.workload.9",
        "'foo' is no override; write key=value, as in migration.skip=hint",
    }
    assert all("\n" not in problem for problem in problems)
    assert "sed: unknown key; did you mean 'seed'?" in problems


def test_toml_that_does_not_parse_is_one_line():
    (problem,) = problems_of("[guest\nmemory = 1")
    assert "not valid TOML" in problem


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("guest.memory=12MiB", "guest.memory"),
        ("guest.memory=66MiB", "guest.memory"),
        ("guest.workload.0.fraction=0.95", "guest.workload"),
        ("guest.workload.0.keep=0.8", "guest.workload.0.keep"),
        ("guest.workload.1.records=1_000_000", "guest.workload"),
        ("balloon.num_pages=32MiB", "balloon.num_pages"),
        ("migration.tracker=hash", "migration.tracker"),
        ("balloon.hints=both", "balloon.hints"),
        ("balloon.hints=off", "balloon.hints"),
        ("balloon.poison=0xAAAAAAAA", "balloon.poison"),
        ("balloon.poison=-1", "balloon.poison"),
        ("balloon.sg=1", "balloon.sg"),
        ("migration.unsafe_clear_dirty_log_at_hint=true", "migration.unsafe_clear_dirty_log_at_hint"),
        ("migration.rounds_max=0", "migration.rounds_max"),
        ("run.run_on=0ms", "run.run_on"),
        ("seed=-1", "seed"),
        ("hosts.kind=pods", "hosts.kind"),
        ("engine=qemu", "engine"),
        ("name=../up", "name"),
    ],
)
def test_what_cannot_be_is_refused_at_its_path(override, path):
    (problem,) = problems_of(GOOD, overrides=[override])
    assert problem.startswith(f"{path}: ")


def test_a_rule_that_loses_writes_needs_a_scenario_that_expects_it():
    unsafe = "migration.unsafe_clear_dirty_log_at_hint=true"
    (problem,) = problems_of(GOOD, overrides=[unsafe, "expect=failed"])
    assert "needs expect = 'corruption', not 'failed'" in problem
    (problem,) = problems_of(GOOD, overrides=[unsafe, "expect=corruption", "migration.skip=zero"])
    assert "means nothing with skip = 'zero'" in problem
    scenario = parse(GOOD, default_name="x", overrides=[unsafe, "expect=corruption"])
    assert scenario.migration.unsafe_clear_dirty_log_at_hint
    assert not parse(GOOD, default_name="x").migration.unsafe_clear_dirty_log_at_hint


def test_balloon_keys_that_mean_nothing_together_are_refused():
    overrides = ["balloon.hints=walk", "balloon.hint_wait_on_ack=true"]
    (problem,) = problems_of(GOOD, overrides=overrides)
    assert problem.startswith("balloon.hint_wait_on_ack: ")


@pytest.mark.parametrize("more", [["balloon.hints=off"], ["balloon.poison=0xAAAAAAAA"]])
def test_without_hints_a_guest_may_poison_and_need_not_hint(more):
    scenario = parse(GOOD, default_name="x", overrides=[*more, "migration.skip=zero"])
    assert scenario.migration.skip == "zero"


def test_poisoning_with_zeroes_goes_with_hints():
    """A skipped page reads as zero at the destination: the very value."""
    assert parse(GOOD, default_name="x", overrides=["balloon.poison=0"]).balloon.poison == 0


def test_the_agent_understands_what_the_scenario_says_of_the_driver():
    options = parse(GOOD, default_name="x", overrides=["balloon.hints=walk"]).balloon.driver_options()
    assert BalloonOptions.from_dict(options).to_dict() == options
    defaults = parse(GOOD, default_name="x").balloon.driver_options()
    assert BalloonOptions().to_dict() == defaults, "and both have the same defaults"


@pytest.mark.parametrize("skip", ["none", "zero"])
def test_the_hash_tracker_goes_with_skips_that_need_no_hints(skip):
    scenario = parse(GOOD, default_name="x", overrides=["migration.tracker=hash", f"migration.skip={skip}"])
    assert scenario.migration.tracker == "hash"


def test_overrides_reach_into_lists_and_name_the_scenario():
    overrides = ["guest.workload.0.fraction=0.5", "migration.skip=hint"]
    scenario = parse(GOOD, default_name="demo", overrides=overrides, unnamed=["seed=9"])
    first = scenario.guest.workload[0]
    assert isinstance(first, Freed)
    assert first.fraction == 0.5
    assert scenario.seed == 9
    assert scenario.name == "demo-fraction-0.5-skip-hint"


def test_names_tell_keys_apart_that_end_alike():
    varied = {"guest.workload.0.fraction": 0.5, "guest.workload.1.fraction": 0.1}
    assert varied_name("demo", varied) == "demo-0.fraction-0.5-1.fraction-0.1"


def test_names_are_file_names():
    assert varied_name("demo", {"migration.bandwidth": "1Gbit/s"}) == "demo-bandwidth-1Gbit_s"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("guest.workload.x.fraction=1", "is no item of this list"),
        ("guest.workload.2.fraction=1", "items are 0 to 1"),
        ("guest.memory.x=1", "is a value, not a table"),
        ("=1", "is no override"),
        ("guest memory=1", "is no override"),
    ],
)
def test_an_override_that_leads_nowhere_is_told(override, complaint):
    assert any(complaint in problem for problem in problems_of(GOOD, overrides=[override]))


def test_values_of_the_command_line_are_toml_or_text():
    assert [parse_value(text) for text in ("3", "0.5", "true", "2GiB", "hint", '"3"')] == [
        3, 0.5, True, "2GiB", "hint", "3",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_scenario_of_the_project_loads(path):
    assert load(path).name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# "), "a scenario tells its story"


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.toml")
