"""How a dirty rate is measured, and what is predicted from it."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from rich.console import Console

from host.dirty_rate import PERIODS_MAX, TOTAL_MS_MAX, HashLooks, check_periods, measure
from host.guest_memory import HostRam
from migration.page_bits import PageBits
from migration.pages import PAGE_BYTES
from migration.pb import node_pb2
from testbed.errors import UsageError
from testbed.experiments.dirty_rate import dirty_rate_report, foreseen, parsed_period_ms, parsed_rate
from testbed.scenario.document import Scenario

PAGES = 64


class NoWait:
    """Periods that pass at once; stops after `left` of them."""

    def __init__(self, left=10**9):
        self.left = left

    def wait(self, timeout):
        self.left -= 1
        return self.left < 0


class Scripted:
    """Looks that find what the script says."""

    def __init__(self, *found):
        self.found = list(found)
        self.started = False

    def start(self):
        self.started = True

    def harvest(self):
        assert self.started
        mask = np.zeros(PAGES, np.bool_)
        mask[self.found.pop(0)] = True
        return PageBits.of(mask)


def test_samples_count_each_period_and_the_curve_counts_pages_once():
    looks = Scripted([1, 2, 3], [2, 3], [3, 40, 41])
    found = measure(looks, "uffd", 5, 3, NoWait())
    assert found.dirtied_pages == (3, 2, 3)
    assert found.cumulative_pages == (3, 3, 5)
    assert len(found.period_ms) == 3
    assert min(found.period_ms) > 0


def test_a_stopping_host_ends_the_measurement_with_what_it_has():
    found = measure(Scripted([1], [2]), "uffd", 5, 3, NoWait(left=1))
    assert found.cumulative_pages == (1,)


def test_the_wait_is_a_wait():
    found = measure(Scripted([1]), "uffd", 20, 1, threading.Event())
    assert found.period_ms[0] >= 20


def test_hashes_see_what_changed_between_two_looks():
    ram = HostRam.create(PAGES * PAGE_BYTES)
    looks = HashLooks(ram)
    looks.start()
    ram.store(np.array([7], np.uint64), np.array([2], np.uint64), memoryview(bytes([1]) * 2 * PAGE_BYTES))
    assert np.flatnonzero(looks.harvest()).tolist() == [7, 8]
    assert not looks.harvest().any()
    ram.close()


@pytest.mark.parametrize(
    ("period_ms", "periods"), [(0, 1), (1, 0), (60_001, 1), (1, PERIODS_MAX + 1), (TOTAL_MS_MAX, 2)]
)
def test_what_one_call_cannot_measure_is_refused(period_ms, periods):
    with pytest.raises(ValueError, match="ms"):
        check_periods(period_ms, periods)


def scenario(**migration):
    return Scenario.model_validate({"name": "s", "guest": {"memory": "1GiB"}, "migration": migration})


def reply():
    return node_pb2.DirtyRateReply(
        dirtied_pages=[1000, 1200, 1100],
        period_ms=[100.0, 100.0, 100.0],
        cumulative_pages=[1000, 1600, 1800],
        working_set_pages=1800,
        hintable_pages=150_000,
        populated_pages=250_000,
        ballooned_pages=1000,
        pages=262_144,
        tracker="uffd",
    )


def test_every_arm_is_predicted_with_the_scenarios_limits():
    found = foreseen(scenario(downtime_limit="100ms"), reply(), 400_000_000, "runs/x").to_dict()
    assert found["dirty_rate"]["pages_per_s"] == {"median": 11_000, "min": 10_000, "max": 12_000}
    assert found["working_set_pages"] == 1800
    assert found["rate_source"] == "--rate"
    arms = found["predictions"]
    assert list(arms) == ["none", "zero", "hint", "both"]
    assert all(arm["converges"] for arm in arms.values())
    assert arms["none"]["payload_bytes"] > arms["zero"]["payload_bytes"] > arms["both"]["payload_bytes"]
    json.dumps(found)


def test_a_bandwidth_below_what_the_link_carries_is_the_rate():
    found = foreseen(scenario(bandwidth="100MB/s"), reply(), 0, "")
    assert (found.rate_bytes_per_s, found.rate_source) == (100_000_000, "migration.bandwidth")


def test_a_guest_that_outruns_the_link_is_said_not_to_converge():
    found = foreseen(scenario(downtime_limit="10ms"), reply(), 20_000_000, "")
    assert not found.predictions["none"].converges
    console = Console(record=True, width=200)
    console.print(dirty_rate_report(found))
    assert "does not converge" in console.export_text()


def test_options_are_quantities():
    assert (parsed_period_ms("250ms"), parsed_rate("1Gbit/s"), parsed_rate("")) == (250, 125_000_000, 0)
    with pytest.raises(UsageError, match="--period"):
        parsed_period_ms("soon")
