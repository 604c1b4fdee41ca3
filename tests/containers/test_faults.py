"""Faults of hosts in containers: measured inside, healed to the state in which they were found; whole runs."""

import json
import time

import pytest

from testbed.faults.fault import Target, apply, healing_of, parse_fault, ports_of
from testbed.hosts import execution
from testbed.record.run_record import load
from tests.containers.beds import tiny
from tests.live.networks import Side, needs_namespaces
from tests.live.runs import TINY, guest_is_whole, perform, waited_for

pytestmark = [needs_namespaces, pytest.mark.live]
TABLE = "ballast_test_1"


def sides(bed):
    """Both hosts' networks."""
    return [
        Side(port.pid, "eth0", port.address)
        for port in ports_of({o: bed.hosts.hosts[o] for o in ("source", "dest")})
    ]


def state(bed):
    """What a fault might leave behind; the name of an interface is not what a host is found by."""
    found = []
    for side in sides(bed):
        qdiscs = side.run("tc", "qdisc", "show")
        addresses = [line.split()[3] for line in side.run("ip", "-4", "-o", "addr").splitlines()]
        found.append(
            (qdiscs.count("noqueue"), "tbf" in qdiscs, TABLE in side.run("nft", "list", "tables"), addresses)
        )
    return found, [bed.hosts.hosts[origin].container.limits() for origin in ("source", "dest")]


@pytest.fixture
def in_force(bed):
    """Applies a fault to the destination; heals it from its description, and compares."""
    before, applied = state(bed), []

    def bring(kind, **parameters):
        fault = parse_fault(kind, parameters)
        hosts = bed.hosts.hosts
        applied.append(apply(fault, Target(hosts, fault.origin, TABLE, 7, ports_of(hosts))))
        return applied[-1]

    yield bring
    for one in reversed(applied):
        healing_of(json.loads(json.dumps(one.description))).heal(bed.hosts.hosts)
    assert state(bed) == before


def round_trip_ms(bed):
    a, b = sides(bed)
    with a.udp() as one, b.udp() as other:
        taken = []
        for _ in range(5):
            started = time.monotonic()
            one.sendto(b"?", other.getsockname())
            other.sendto(b"!", other.recvfrom(10)[1])
            one.recv(10)
            taken.append((time.monotonic() - started) * 1000)
    return sorted(taken)[2]


def test_a_delay_between_containers_is_in_the_round_trip(bed, in_force):
    assert round_trip_ms(bed) < 10
    in_force("delay", delay="25ms")
    assert 50 <= round_trip_ms(bed) < 80


def test_a_partition_silences_the_network_and_not_the_testbed(bed, in_force):
    a, b = sides(bed)
    in_force("partition")
    with a.udp() as sender, b.udp() as receiver:
        sender.sendto(b"?", receiver.getsockname())
        receiver.settimeout(0.1)
        with pytest.raises(TimeoutError):
            receiver.recv(10)
    assert bed.dest.guest_status().state == "standby"


def test_a_duplicate_comes_from_the_bridge_as_packets_do(bed, in_force):
    a, b = sides(bed)
    in_force("duplicate", share="100%", direction="in")
    with a.udp() as sender, b.udp() as receiver:
        sender.sendto(b"twice", receiver.getsockname())
        assert [receiver.recv(10) for _ in range(2)] == [b"twice"] * 2
        receiver.settimeout(0.1)
        with pytest.raises(TimeoutError):
            receiver.recv(10)


def test_a_rate_is_what_a_stream_between_containers_gets(bed, in_force):
    a, b = sides(bed)
    in_force("rate", rate="100Mbit/s")
    with (
        b.listen() as listener,
        a.connect(listener.getsockname()) as sender,
        listener.accept()[0] as receiver,
    ):
        started, got, data = time.monotonic(), 0, bytes(1 << 16)
        sender.setblocking(False)
        while got < 4 << 20:
            try:
                sender.send(data)
            except BlockingIOError:
                got += len(receiver.recv(1 << 20))
        assert 0.8 * 12.5 < got / 1e6 / (time.monotonic() - started) < 1.3 * 12.5


def test_a_container_off_the_network_comes_back_with_its_address(bed, in_force):
    address = bed.hosts.dest.container.address
    gone = in_force("disconnect")
    assert address not in sides(bed)[1].run("ip", "-4", "-o", "addr")
    gone.heal(bed.hosts.hosts)
    assert address in sides(bed)[1].run("ip", "-4", "-o", "addr")


def test_limits_are_lowered_and_are_again_what_they_were(bed, in_force):
    in_force("memory", limit="900MiB")
    in_force("slow", cpus=0.5)
    assert bed.hosts.dest.container.limits() == (900 << 20, 0.5)


def test_a_slow_host_gets_the_time_that_its_quota_says(bed, in_force):
    in_force("slow", cpus=0.25)
    program = "import time\nend = time.time() + 1\nwhile time.time() < end: pass\nprint(time.process_time())"
    code, said = execution.run(bed.hosts.dest.container.handle, ["python3", "-c", program])
    assert code == 0
    assert float(said) < 0.6


def test_a_paused_container_is_silent_and_goes_on(bed, in_force):
    paused = in_force("pause", what="container", host="dest")
    container = bed.hosts.dest.container
    container.handle.reload()
    assert container.handle.attrs["State"]["Paused"]
    paused.heal(bed.hosts.hosts)
    waited_for(lambda: bed.dest.guest_status().state == "standby", "the destination to answer again")


def test_a_link_and_faults_on_it_in_a_whole_run(tmp_path, nothing_left):  # noqa: ARG001
    faults = """
[link]
rate = "200Mbit/s"
delay = "5ms"
offload = false
[[fault]]
kind = "disconnect"
at = "round 1 50%"
for = "300ms"
[[fault]]
kind = "loss"
share = "2%"
burst_packets = 5
at = "stop_copy"
"""
    run = perform(tmp_path, tiny("migration.link_timeout=20s", text=TINY + faults))
    assert (run.result.outcome, run.exit_code) == ("completed", 0), run.judgement.reasons
    record = guest_is_whole(run, "dest")
    assert run.result.engine["link"]["rate_bytes_per_s"] == 25_000_000
    shaped = [event.fields for event in record.all("link_shaped")]
    assert [one["host"] for one in shaped][-1:] == ["dest"], "and again after the interface was a new one"
    assert len(shaped) == 3
    assert not any(shaped[0]["offloads"].values())
    disconnected, lossy = run.result.faults
    assert (disconnected.kind, lossy.kind, lossy.at) == ("disconnect", "loss", "stop_copy")
    assert disconnected.healed_at_ms - disconnected.applied_at_ms >= 300
    assert lossy.packets is not None


@pytest.mark.parametrize("offload", ["true", "false"])
def test_packets_that_come_twice_are_counted_and_explained(tmp_path, nothing_left, offload):  # noqa: ARG001
    twice = f"""
[link]
offload = {offload}
[[fault]]
kind = "duplicate"
share = "5%"
at = "round 1 10%"
"""
    run = perform(tmp_path, tiny("migration.bandwidth=32MiB/s", text=TINY + twice))
    assert (run.result.outcome, run.exit_code) == ("completed", 0), run.judgement.reasons
    account = run.result.account
    assert account.dest_received_bytes > 1.01 * account.wire_forward_bytes, (
        "copies are on the destination's wire"
    )
    assert account.dest_stream_bytes < account.wire_forward_bytes, "and in its streams once"


BITS_THAT_NO_CHECKSUM_SHOWS = """
[link]
offload = false
[[fault]]
kind = "corrupt"
share = "1%"
checksum = "fixed"
direction = "in"
at = "round 1 10%"
for = "500ms"
"""


def test_a_bit_that_only_tls_can_notice_costs_a_connection_and_nothing_else(tmp_path, nothing_left):  # noqa: ARG001
    run = perform(tmp_path, tiny("migration.bandwidth=16MiB/s", text=TINY + BITS_THAT_NO_CHECKSUM_SHOWS))
    assert (run.result.outcome, run.exit_code) == ("completed", 0), run.judgement.reasons
    guest_is_whole(run, "dest")
    (corrupt,) = run.result.faults
    assert corrupt.packets > 0
    assert run.result.recoveries.count > 0


def test_without_tls_a_hash_notices_the_bit_and_the_guest_stays_where_it_was(tmp_path, nothing_left):  # noqa: ARG001
    plain = ("hosts.tls=false", "migration.bandwidth=16MiB/s")
    run = perform(tmp_path, tiny(*plain, text=TINY + BITS_THAT_NO_CHECKSUM_SHOWS, expect="failed"))
    assert (run.result.outcome, run.exit_code) == ("failed", 0), run.judgement.reasons
    assert run.result.outcome_reason.startswith("page stream: invalid argument: bad page chunk")
    guest_is_whole(run, "source")


def test_a_killed_container_is_a_lost_guest_and_a_fact(tmp_path, nothing_left):  # noqa: ARG001
    killed = '[[fault]]\nkind = "kill"\nwhat = "container"\nhost = "source"\nat = "round 1 50%"\n'
    run = perform(tmp_path, tiny(text=TINY + killed, expect="guest_lost"))
    assert load(run.run_dir.path).last("fault_applied") is not None
    assert run.result.outcome in ("guest_lost", "failed")
