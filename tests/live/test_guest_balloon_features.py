"""Statistics, reporting, poison and a driver that is reloaded: a real guest process against the real device.

What they prove: what the guest tells is what it has, memory that it reports leaves the host, a guest whose free
memory keeps a value is never hinted for, and a driver that goes away leaves nothing behind.
"""

import os
from collections.abc import Callable

import pytest

from host.errors import AgentError, DeviceNotReady
from tests.live.agent_host import PAGES, WORKLOADS, Host, fixture_hosts, wait_until
from virtio.balloon import F_FREE_PAGE_HINT, F_PAGE_POISON, F_REPORTING, F_SG, has

__all__ = ["fixture_hosts"]
FREED = [{"name": "freed", "fraction": 0.6, "keep": 0.1}]
POISON = 0xAAAAAAAA


def boot(hosts: Callable[..., Host], workloads: list[dict[str, object]] = FREED, **balloon: object) -> Host:
    return hosts("a", workloads, balloon=balloon).start_agent().start_node().wait_ready()


def resident_bytes(host: Host) -> int:
    info = host.link.ram()
    try:
        return os.fstat(info.memfd).st_blocks * 512
    finally:
        info.close()


def test_the_statistics_are_those_of_the_memory_manager(hosts: Callable[..., Host]) -> None:
    host = boot(hosts)
    first = host.device.guest_stats().values
    assert first["memfree"] == host.link.hello().free_pages * 4096
    assert first["memtot"] == PAGES * 4096
    assert 0 < first["avail"] <= first["memfree"]
    host.device.set_num_pages(3000)
    wait_until(lambda: host.device.status().actual == 3000, "inflation")
    second = host.device.guest_stats().values
    assert second.keys() == first.keys(), "the same subset each time"
    assert second["memtot"] == (PAGES - 3000) * 4096
    assert second["memfree"] == host.link.hello().free_pages * 4096


def test_reported_memory_leaves_the_host(hosts: Callable[..., Host]) -> None:
    quiet = boot(hosts)
    before = resident_bytes(quiet)
    quiet.close()
    host = boot(hosts, reporting=True)
    wait_until(lambda: host.device.status().released_pages > 0.5 * PAGES, "reports")
    after = resident_bytes(host)
    freed = int(0.5 * PAGES) * 4096  # written, then freed
    assert before - after > 0.8 * freed, (before, after)
    # Blocks of a report that is under way are out of the allocator's reach until the device has acknowledged them.
    wait_until(lambda: host.link.hello().free_pages > 0.8 * PAGES, "what was reported is the guest's again")
    assert host.link.check(host.oracle.read_bytes())[1] == []


def test_memory_in_use_is_never_reported(hosts: Callable[..., Host]) -> None:
    """A busy guest whose memory is punched under it would fail its own check."""
    host = boot(hosts, WORKLOADS, reporting=True)
    wait_until(lambda: host.device.status().reported_pages > 0.5 * PAGES, "reports")
    operations = host.link.hello().operations
    wait_until(lambda: host.link.hello().operations > operations + 2000, "work")
    host.link.pause()
    assert host.link.check(host.oracle.read_bytes())[1] == []


def test_a_guest_that_poisons_says_so_and_is_not_hinted_for(hosts: Callable[..., Host]) -> None:
    """Hazard 7: a skipped page would read as zero at the destination."""
    host = boot(hosts, WORKLOADS, poison=POISON, reporting=True)
    status = host.device.status()
    assert status.poison_value == POISON
    assert has(status.features, F_PAGE_POISON)
    assert "poison" in status.hints_refusal
    with pytest.raises(DeviceNotReady, match="poison"):
        host.device.open_hints()
    wait_until(lambda: host.device.status().reported_pages > 0.3 * PAGES, "reports")
    host.device.set_num_pages(4000)
    wait_until(lambda: host.device.status().actual == 4000, "inflation")
    host.device.set_num_pages(0)
    wait_until(lambda: host.device.status().actual == 0, "deflation")
    host.link.pause()
    assert host.link.check(host.oracle.read_bytes())[1] == [], "every free page reads as the poison"


def test_zeroes_as_poison_go_with_hints_and_reporting(hosts: Callable[..., Host]) -> None:
    host = boot(hosts, WORKLOADS, poison=0, reporting=True)
    assert host.device.status().hints_refusal == ""
    wait_until(lambda: host.device.status().released_pages > 0.3 * PAGES, "reports")
    assert host.hint().sum() > 0.3 * PAGES
    host.device.hints_done()
    wait_until(lambda: host.link.hello().held_pages == 0, "DONE")
    host.link.pause()
    assert host.link.check(host.oracle.read_bytes())[1] == []


def test_a_walked_report_holds_nothing(hosts: Callable[..., Host]) -> None:
    host = boot(hosts, hints="walk")
    free = host.link.hello().free_pages
    hinted = host.hint()
    hello = host.link.hello()
    assert (hello.held_pages, hello.free_pages) == (0, free)
    assert hinted.sum() > 0.95 * free
    assert host.hint().sum() == hinted.sum(), "the next id reports the same blocks again"


def test_a_reloaded_driver_gave_everything_back_and_agrees_anew(hosts: Callable[..., Host]) -> None:
    host = boot(hosts)
    host.device.set_num_pages(4000)
    wait_until(lambda: host.device.status().actual == 4000, "inflation")
    host.hint()
    assert host.link.hello().held_pages > 0
    deflated = host.device.status().deflated_pages
    fields, _ = host.link.request("reload_balloon", options={"hints": "walk", "reporting": True, "sg": False})
    assert host.device.status().deflated_pages >= deflated + 4000
    assert has(fields["features"], F_REPORTING)
    assert not has(fields["features"], F_SG)
    wait_until(lambda: host.device.status().ready, "the new driver")
    wait_until(lambda: host.device.status().actual == 4000, "the host still wants a balloon of that size")
    assert host.device.status().features == fields["features"]
    assert host.link.hello().held_pages == 0
    assert host.hint().sum() > 0.5 * PAGES
    assert host.link.hello().held_pages == 0, "the driver that walks"
    assert host.link.check(host.oracle.read_bytes())[1] == []


def test_a_driver_may_be_reloaded_again_and_again(hosts: Callable[..., Host]) -> None:
    host = boot(hosts, WORKLOADS)
    host.device.set_num_pages(2000)
    for hints in ("walk", "off", "hold"):
        fields, _ = host.link.request("reload_balloon", options={"hints": hints})
        assert has(fields["features"], F_FREE_PAGE_HINT) == (hints != "off")
        wait_until(lambda: host.device.status().ready, "the new driver")
        wait_until(lambda: host.device.status().actual == 2000, "inflation")
    host.link.pause()
    assert host.link.check(host.oracle.read_bytes())[1] == []


def test_what_memory_is_poisoned_with_is_not_the_driver_s_to_change(hosts: Callable[..., Host]) -> None:
    host = boot(hosts, [{"name": "idle"}])
    with pytest.raises(AgentError, match="does not change"):
        host.link.request("reload_balloon", options={"poison": 1})
    with pytest.raises(AgentError, match="unknown options"):
        host.link.request("reload_balloon", options={"colour": "red"})
