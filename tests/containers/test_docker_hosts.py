"""Two containers as hosts: a whole run, what each handle does, limits, and that nothing is left."""

import os
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from testbed.errors import RunBrokenError
from testbed.hosts import execution, subnets
from testbed.record.run_record import load
from tests.containers.beds import tiny
from tests.live.runs import perform, waited_for

pytestmark = [pytest.mark.containers, pytest.mark.usefixtures("image")]


@pytest.mark.usefixtures("nothing_left")
def test_a_guest_moves_between_two_containers_and_nothing_is_left(tmp_path):
    run = perform(tmp_path, tiny("hosts.memory=512MiB", "hosts.cpus=2"))
    assert (run.result.outcome, run.result.verdict) == ("completed", "valid"), run.result.reasons
    assert run.exit_code == 0
    assert run.result.hints.skipped_pages > 0, (
        "the kernel tracks the guest's writes inside a container as well"
    )
    record = load(run.run_dir.path)
    addresses = [IPv4Address(event.fields["address"]) for event in record.all("container_started")]
    assert len(set(addresses)) == 2
    assert all(address in subnets.RANGE for address in addresses)
    owned = {path.stat().st_uid for path in run.run_dir.path.rglob("*") if not path.is_symlink()}
    assert owned == {os.getuid()}, "the record belongs to who ran it"
    began = min(event.at_ns for event in record.all("network_made"))
    serving = max(event.at_ns for event in record.all("node_described"))
    first_page = next(record.all("round_started", "source")).at_ns
    # Generous: the machine may be busy. benchmarks/containers.py has the figures.
    assert (serving - began) / 1e9 < 20
    assert first_page > serving


def test_inside_nothing_is_root_and_nothing_has_a_capability(bed):
    for host in bed.hosts.hosts.values():
        for process in (host.node, host.agent):
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            assert status["Uid"].split() == [str(os.getuid() or 10001)] * 4
            assert {status[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert status["NoNewPrivs"] == "1"
        status, _ = execution.run(host.container.handle, ["touch", "/opt/ballast/x"])
        assert status != 0, "the root is read-only"


def test_the_control_channel_is_no_network_and_the_hosts_see_only_each_other(bed):
    source, dest = bed.hosts.source, bed.hosts.dest
    attributes = source.container.handle.client.networks.get(f"ballast-{bed.run_id}").attrs
    assert attributes["Internal"] is True
    subnet = IPv4Network(attributes["IPAM"]["Config"][0]["Subnet"])
    assert {IPv4Address(host.container.address) in subnet for host in (source, dest)} == {True}
    own, other = (Path(f"/proc/{host.network_pid}/ns/net").stat().st_ino for host in (source, dest))
    assert len({own, other, Path("/proc/self/ns/net").stat().st_ino}) == 3
    assert source.server_name == f"a.{bed.run_id}.ballast", (
        "the link is encrypted unless hosts.tls says otherwise"
    )
    dest.container.disconnect()
    try:
        assert dest.client.guest_status().state == "standby", "asked over a unix socket"
    finally:
        dest.container.connect()
    dest.container.handle.reload()
    network = dest.container.handle.attrs["NetworkSettings"]["Networks"][f"ballast-{bed.run_id}"]
    assert network["IPAddress"] == dest.container.address, "it came back with its address"


def test_a_node_is_killed_alone_and_comes_back_with_its_journal(bed):
    dest = bed.hosts.dest
    agent, first, address = dest.agent.pid, dest.node.pid, dest.migration_address
    dest.node.kill()
    assert not dest.node.alive
    ended = bed.wait("process_ended", "testbed", process="dest-node")
    assert (ended.fields["asked"], ended.fields["status"]) == (False, "was killed by SIGKILL")
    assert dest.agent.alive
    assert dest.agent.pid == agent
    dest.node.restart()
    assert dest.node.pid not in (0, first)
    assert dest.client.describe().migration_address == address
    waited_for(lambda: dest.client.guest_status().state == "standby", "the node to find its agent")
    with pytest.raises(RunBrokenError, match="nothing to start again"):
        dest.node.restart()


def test_a_process_is_paused_and_goes_on(bed):
    agent = bed.hosts.source.agent
    agent.pause()
    waited_for(lambda: _state(agent.pid) == "T", "the agent to stand still")
    agent.resume()
    waited_for(lambda: _state(agent.pid) != "T", "the agent to go on")
    assert agent.cpu_seconds() > 0


def test_a_whole_host_is_paused_killed_and_started(bed):
    host = bed.hosts.dest
    host.container.pause()
    assert host.container.alive
    host.container.unpause()
    assert host.client.guest_status().state == "standby"
    host.container.kill()
    assert not host.container.alive
    assert host.network_pid is None
    for process in ("dest-node", "dest-agent"):
        bed.wait("process_ended", "testbed", process=process)
    host.container.start()
    assert host.container.alive
    assert host.network_pid
    waited_for(lambda: host.client.guest_status().state == "standby", "an empty agent to wait for a guest")


def test_limits_are_the_kernels_and_can_be_changed(bed):
    container = bed.hosts.dest.container
    assert container.limits() == (0, 0.0)
    container.limit(memory_bytes=512 << 20, cpus=0.5)
    assert container.limits() == (512 << 20, 0.5)
    where = "/sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes"
    _, said = execution.run(container.handle, ["sh", "-c", f"cat {where} 2>/dev/null"])
    assert said.split() == [str(512 << 20)]
    container.limit(memory_bytes=0, cpus=0.0)
    assert container.limits() == (0, 0.0)


def test_the_guest_still_migrates_after_all_that(bed):
    """The last test of the bed: every healed host is a whole host."""
    ended = bed.migrate(dest_server_name=bed.hosts.dest.server_name)
    assert ended.fields["outcome"] == "completed", ended.fields["reason"]
    bed.check(bed.dest)


@pytest.mark.usefixtures("nothing_left")
def test_the_link_is_plain_where_the_scenario_says_so(tmp_path):
    run = perform(tmp_path, tiny("hosts.tls=false"))
    assert run.result.verdict == "valid", run.result.reasons
    log = (run.run_dir.logs / "dest-node.log").read_text()
    assert "plain_text" in log or "insecure" in log


@pytest.mark.usefixtures("nothing_left")
def test_memory_that_is_spent_is_a_fact_and_a_reason(tmp_path):
    run = perform(tmp_path, tiny("hosts.memory=96MiB", "migration.link_timeout=0s", expect="failed"))
    assert run.result.outcome == "failed"
    spent = load(run.run_dir.path).last("out_of_memory")
    assert spent is not None, run.result.outcome_reason
    assert spent.fields["limit_bytes"] == 96 << 20
    assert "was killed by SIGKILL: the container's memory of 96" in run.result.outcome_reason


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
