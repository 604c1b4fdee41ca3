"""Every fault of packets, measured from inside two namespaces, and that its healer leaves them exactly as found."""

import json
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from testbed.faults import offload
from testbed.faults.errors import FaultError
from testbed.faults.fault import Port, Target, apply, healing_of, parse_fault
from testbed.faults.loss import Loss
from testbed.faults.rules import chosen
from tests.live.networks import needs_namespaces, pair

pytestmark = [needs_namespaces, pytest.mark.live]
LABEL = "ballast_test_1"
SEED = 7


@pytest.fixture(scope="module")
def sides():
    with pair() as made:
        yield made


def target_of(sides, origin="dest", label=LABEL):
    ports = [Port(name, side.pid, side.address) for name, side in zip(("source", "dest"), sides, strict=True)]
    return Target({}, origin, label, SEED, ports)


@contextmanager
def in_force(sides, kind, **parameters):
    """Applied, and healed from what a file could keep; the namespaces are as they were. Yields what is counted."""
    before = [side.state() for side in sides]
    counted = SimpleNamespace(packets=-1)
    applied = apply(parse_fault(kind, parameters), target_of(sides))
    try:
        yield counted
    finally:
        description = json.loads(json.dumps(applied.description))
        counted.packets = healing_of(description).heal().get("packets", 0)
    assert [side.state() for side in sides] == before
    assert healing_of(description).heal().get("packets", 0) == 0, "healing twice is healing once"


def sent(sides, numbers, settle_s=0.3):
    """The numbers that arrive at b of those that a sends, in the order of their arrival."""
    a, b = sides
    with a.udp() as sender, b.udp() as receiver:
        arrived = []
        for number in numbers:
            sender.sendto(number.to_bytes(4, "big") + bytes(60), receiver.getsockname())
        receiver.settimeout(settle_s)
        try:
            while True:
                arrived.append(int.from_bytes(receiver.recv(100)[:4], "big"))
        except TimeoutError:
            return arrived


def round_trip_ms(sides, times=5):
    a, b = sides
    with a.udp() as one, b.udp() as other:
        taken = []
        for _ in range(times):
            started = time.monotonic()
            one.sendto(b"?", other.getsockname())
            other.sendto(b"!", other.recvfrom(10)[1])
            one.recv(10)
            taken.append((time.monotonic() - started) * 1000)
        return sorted(taken)[times // 2]


def stream(sides, size):
    """Seconds until b has `size` bytes from a by TCP, and whether they are the ones that were sent."""
    a, b = sides
    data = bytes(range(256)) * (size // 256)
    with (
        b.listen() as listener,
        a.connect(listener.getsockname()) as sender,
        listener.accept()[0] as receiver,
    ):
        receiver.settimeout(20)
        sender.setblocking(False)
        started, place, got = time.monotonic(), 0, bytearray()
        while len(got) < len(data):
            try:
                place += sender.send(data[place : place + (1 << 18)]) if place < len(data) else 0
                receiver.setblocking(False)
                got += receiver.recv(1 << 20)
            except BlockingIOError:
                time.sleep(0)
            assert time.monotonic() - started < 30
        return time.monotonic() - started, bytes(got) == data


def checksum_errors(side):
    """UDP packets whose checksum the kernel inside found wrong."""
    names, values = (line.split() for line in side.read("snmp").splitlines() if line.startswith("Udp:"))
    return int(values[names.index("InCsumErrors")])


def test_partition_both_ways_lets_nothing_through_and_one_way_lets_one_way_through(sides):
    with in_force(sides, "partition") as both:
        assert sent(sides, range(20), 0.05) == []
        assert sent(sides[::-1], range(20), 0.05) == []
    assert both.packets >= 40
    with in_force(sides, "partition", direction="in") as into_b:
        assert sent(sides, range(20), 0.05) == []
        assert sent(sides[::-1], range(20), 0.05) == list(range(20))
    assert into_b.packets == 20
    with in_force(sides, "partition", direction="out"):
        assert sent(sides, range(20), 0.05) == list(range(20))
        assert sent(sides[::-1], range(20), 0.05) == []
    assert sent(sides, range(20), 0.05) == list(range(20))


def test_loss_loses_exactly_the_packets_that_its_seed_says(sides):
    with in_force(sides, "loss", share="5%", direction="in") as lost:
        arrived = sent(sides, range(2000))
    expected = set(chosen(0.05, SEED)) & set(range(2000))
    assert 60 < len(expected) < 140
    assert set(range(2000)) - set(arrived) == expected
    assert lost.packets == len(expected)


def test_loss_in_bursts_loses_neighbours(sides):
    parameters = {"share": 0.05, "burst_packets": 8, "direction": "in"}
    with in_force(sides, "loss", **parameters) as lost:
        arrived = sent(sides, range(4000))
    missing = sorted(set(range(4000)) - set(arrived))
    assert missing == [number for number in Loss(kind="loss", **parameters).numbers(SEED) if number < 4000]
    assert lost.packets == len(missing)
    bursts = sum(number - 1 not in missing for number in missing)
    assert len(missing) / bursts > 4, "mean burst"


def test_rate_is_what_a_stream_gets_and_a_second_one_gives_the_first_back(sides):
    assert stream(sides, 8 << 20)[0] < 0.5
    with in_force(sides, "rate", rate="100Mbit/s"):
        slow_s, whole = stream(sides, 8 << 20)
        assert whole
        assert 0.8 * 12.5 < 8.39 / slow_s < 1.1 * 12.5 + 128 / 1024, "MB/s, of 12.5"
        inner = apply(parse_fault("rate", {"rate": "400Mbit/s"}), target_of(sides, label="ballast_test_2"))
        faster_s, _ = stream(sides, 8 << 20)
        assert faster_s < slow_s / 2
        inner.heal()
        assert "rate 100Mbit" in sides[0].run("tc", "qdisc", "show", "dev", sides[0].interface)


def test_rate_leaves_an_interface_alone_that_has_a_discipline_of_its_own(sides):
    a, _ = sides
    a.run(
        "tc",
        "qdisc",
        "add",
        "dev",
        a.interface,
        "root",
        "tbf",
        "rate",
        "1gbit",
        "burst",
        "1mb",
        "latency",
        "9ms",
    )
    before = [side.state() for side in sides]
    with pytest.raises(FaultError, match=r"discipline of its own \(tbf\)"):
        apply(parse_fault("rate", {"rate": "1Mbit/s"}), target_of(sides))
    assert [side.state() for side in sides] == before, "and what was done at the other host is undone"
    a.run("tc", "qdisc", "del", "dev", a.interface, "root")


def test_reset_ends_connections_at_both_ends_and_refuses_new_ones(sides):
    a, b = sides
    with b.listen() as listener, a.connect(listener.getsockname()) as one, listener.accept()[0] as other:
        one.sendall(b"hello")
        assert other.recv(10) == b"hello"
        with in_force(sides, "reset") as reset:
            one.sendall(b"more")
            other.settimeout(5)
            one.settimeout(5)
            with pytest.raises(ConnectionResetError):
                one.recv(10)
            with pytest.raises(ConnectionRefusedError):
                a.connect(listener.getsockname())
            with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012 - which of them is the kernel's
                other.sendall(b"x")
                other.recv(10)
        assert reset.packets >= 2
    assert stream(sides, 1 << 20)[1]


def test_delay_and_jitter_are_in_the_round_trip_and_keep_the_order(sides):
    assert round_trip_ms(sides) < 5
    with in_force(sides, "delay", delay="30ms", direction="in") as one_way:
        assert 30 <= round_trip_ms(sides) < 45
    assert one_way.packets == 5
    with in_force(sides, "delay", delay="20ms", jitter="10ms"):
        assert 40 <= round_trip_ms(sides) < 75
        assert sent(sides, range(500)) == list(range(500))


def test_a_delay_that_is_healed_lets_go_of_what_it_held(sides):
    a, b = sides
    with a.udp() as sender, b.udp() as receiver:
        with in_force(sides, "delay", delay="60s", direction="in"):
            sender.sendto(b"late", receiver.getsockname())
            receiver.settimeout(0.05)
            with pytest.raises(TimeoutError):
                receiver.recv(10)
        receiver.settimeout(5)
        assert receiver.recv(10) == b"late"


def test_reordered_packets_arrive_behind_those_that_followed_them(sides):
    with in_force(sides, "reorder", share="3%", by="50ms", direction="in") as held:
        arrived = sent(sides, range(1000))
    late = [number for number in chosen(0.03, SEED) if number < 1000]
    assert sorted(arrived) == list(range(1000))
    assert arrived == [number for number in range(1000) if number not in late] + late
    assert held.packets == len(late)


def test_duplicated_packets_arrive_twice(sides):
    with in_force(sides, "duplicate", share="10%", direction="in") as repeated:
        arrived = sent(sides, range(500))
    numbers = [number for number in chosen(0.1, SEED) if number < 500]
    assert sorted(arrived) == sorted([*range(500), *numbers])
    assert repeated.packets == len(numbers)
    with in_force(sides, "duplicate", share="100%", direction="in"):
        assert sorted(sent(sides, range(50))) == sorted([*range(50)] * 2), "a copy is not copied again"


def test_corrupted_packets_do_not_reach_a_program_unless_their_checksum_was_corrected(sides):
    a, b = sides
    with in_force(sides, "corrupt", share="5%", direction="in") as broken:
        before = checksum_errors(b)
        arrived = sent(sides, range(1000))
    numbers = [number for number in chosen(0.05, SEED) if number < 1000]
    assert sorted(set(range(1000)) - set(arrived)) == numbers
    assert checksum_errors(b) - before == len(numbers) == broken.packets
    with (
        in_force(sides, "corrupt", share="100%", direction="in", checksum="fixed"),
        a.udp() as sender,
        b.udp() as receiver,
    ):
        for length in (1, 63, 64, 1400):
            sender.sendto(bytes(length), receiver.getsockname())
            got = receiver.recv(2000)
            assert (len(got), sum(byte.bit_count() for byte in got)) == (length, 1), "one bit, and nobody saw"


def test_a_stream_survives_every_harm_that_tcp_repairs(sides):
    for kind, parameters in (
        ("loss", {"share": "1%"}),
        ("reorder", {"share": "2%", "by": "2ms"}),
        ("duplicate", {"share": "2%"}),
        ("corrupt", {"share": "1%"}),
        ("delay", {"delay": "2ms", "jitter": "1ms"}),
    ):
        with in_force(sides, kind, **parameters) as harm:
            assert stream(sides, 4 << 20)[1], kind
        assert harm.packets > 0, kind


def test_faults_are_laid_over_one_another_and_healed_in_any_order(sides):
    before = [side.state() for side in sides]
    layers = [
        apply(parse_fault(kind, parameters), target_of(sides, label=f"ballast_test_{number}"))
        for number, (kind, parameters) in enumerate(
            [("delay", {"delay": "10ms"}), ("delay", {"delay": "10ms"}), ("loss", {"share": "1%"})]
        )
    ]
    assert round_trip_ms(sides) >= 40
    for layer in (layers[0], layers[2], layers[1]):
        layer.heal()
    assert [side.state() for side in sides] == before


def test_a_packet_handler_ends_with_its_host():
    with pair() as sides:
        applied = apply(parse_fault("delay", {"delay": "10ms"}), target_of(sides))
        handlers = [part["handler"] for part in applied.undo["handlers"]]
    for pid in handlers:
        with_pid(pid)
    assert applied.heal() == {"packets": 0}, "and healing what is gone is no error"


def with_pid(pid):
    """Waits for the end of a process that is not our child's child."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives on")


def test_offloads_are_set_and_set_back(sides):
    a, _ = sides
    before = offload.read(a.pid, a.address)
    assert set(before) == {"tso", "gso", "gro"}
    assert offload.write(a.pid, a.address, {"tso": False, "gso": False, "gro": False}) == before
    assert not any(offload.read(a.pid, a.address).values())
    offload.write(a.pid, a.address, before)
    assert offload.read(a.pid, a.address) == before


def test_a_host_that_is_off_the_network_is_told(sides):
    ports = [Port("source", sides[0].pid, sides[0].address), Port("dest", sides[1].pid, "198.18.9.9")]
    with pytest.raises(FaultError, match="no interface of the host has the address"):
        apply(parse_fault("rate", {"rate": "1Mbit/s"}), Target({}, "dest", LABEL, SEED, ports))


def test_sockets_of_the_harness_are_inside(sides):
    """Otherwise everything above would measure this machine."""
    with sides[0].udp() as inside, pytest.raises(OSError, match=r"[Nn]etwork is unreachable|[Ii]nvalid"):
        inside.connect(("203.0.113.1", 9))
    with socket.socket() as own, pytest.raises(OSError, match=r"."):
        own.bind((sides[0].address, 0))
