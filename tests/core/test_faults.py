"""Faults without a network: their parameters, what they choose, the schedule, and that each has its page."""

import random
import struct
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.checkers import faults as checker
from testbed.errors import UsageError
from testbed.faults import nft, qdisc, rate
from testbed.faults.fault import Fault, Port, Target, apply, healing_of, kinds, parse_fault
from testbed.faults.loss import gilbert_elliott
from testbed.faults.packet_handler import corrupted
from testbed.faults.parameters import moment_ms, parse_moment, parse_share
from testbed.faults.rules import chosen
from testbed.history import Event
from testbed.host_handles import Limits
from testbed.scenario.fault_keys import KINDS
from testbed.scenario.file import parse
from testbed.scenario.link_keys import Link

ROOT = Path(__file__).resolve().parents[2]
GUEST = '[guest]\nmemory = "64MiB"\n'
DOCKER = GUEST + '[hosts]\nkind = "docker"\n'


def problems(text):
    with pytest.raises(UsageError) as told:
        parse(text, default_name="x")
    return "\n".join(told.value.problems)


def fault(**keys):
    lines = (f"{key} = {'true' if value is True else repr(value)}\n" for key, value in keys.items())
    return "[[fault]]\n" + "".join(lines)


# -- kinds -------------------------------------------------------------------------------------------


def test_every_kind_has_one_file_and_one_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = project["project"]["entry-points"]["ballast.faults"]
    assert set(kinds()) >= set(declared), (
        "reinstall the package: its entry points are older than pyproject.toml"
    )
    for kind, where in declared.items():
        assert where == f"testbed.faults.{kind}:{kind.capitalize()}"
        page = (ROOT / "docs" / "faults" / f"{kind}.md").read_text()
        assert page.startswith(f"# `{kind}`")
        model = KINDS[kind]
        for name, field in model.model_fields.items():
            key = field.alias or name
            assert key in {"kind", "at", "for", "leg"} or f"`{key}`" in page, (
                f"{kind}.md does not tell of {key}"
            )
    assert {path.stem for path in (ROOT / "docs" / "faults").glob("*.md")} == {*declared, "README"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_says_what_the_machine_lacks_in_one_line(kind):
    assert "\n" not in KINDS[kind].lacks()


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="there is no fault 'flood'; one of corrupt, delay"):
        parse_fault("flood", {})


# -- what a scenario may say ---------------------------------------------------------------------------


def test_a_scenario_is_read_and_read_back():
    text = DOCKER + fault(kind="partition", at="round 2", host="dest", direction="in") + 'for = "2s"\n'
    scenario = parse(text + fault(kind="loss", at="1s", share="1%", burst_packets=4), default_name="x")
    partition, loss = scenario.fault
    assert (partition.lasting_ms, partition.at, loss.share, loss.lasting_ms) == (2000, "round 2", 0.01, None)
    assert type(scenario).model_validate(scenario.model_dump(mode="json")) == scenario


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GUEST + fault(kind="partition", at="1s"), "fault.0.kind: 'partition' needs hosts.kind = 'docker'"),
        (GUEST + fault(kind="memory", at="1s", limit="64MiB"), "fault.0.kind: 'memory' needs hosts.kind"),
        (GUEST + fault(kind="kill", at="1s", what="container"), "fault.0.kind: 'kill' needs hosts.kind"),
        (DOCKER + fault(kind="partition"), "fault.0.at: is missing"),
        (DOCKER + fault(kind="partition", at="soon"), "fault.0.at: there is no point 'soon'"),
        (DOCKER + fault(kind="partition", at=3), "fault.0.at: 3 is no moment"),
        (DOCKER + fault(kind="partition", at="1s", **{"for": 0}), "fault.0.for: is 0"),
        (DOCKER + fault(kind="partition", at="1s", host="third"), "fault.0.host: 'third' is no host"),
        (DOCKER + fault(kind="flood", at="1s"), "fault.0.kind: 'flood' is no fault; one of corrupt"),
        (DOCKER + fault(at="1s"), "fault.0.kind: is missing; one of corrupt"),
        (DOCKER + fault(kind="partition", at="1s", fro="1s"), "fault.0.fro: unknown key; did you mean 'for'"),
        (DOCKER + fault(kind="loss", at="1s", share="0%"), "fault.0.share: is 0%"),
        (DOCKER + fault(kind="loss", at="1s", share="101%"), "fault.0.share: '101%' is not between"),
        (DOCKER + fault(kind="loss", at="1s", share=0.5, burst_packets=3, share_in_burst=0.4), "in bursts that"),
        (DOCKER + fault(kind="loss", at="1s", share=0.5, share_in_burst=0.4), "nothing without burst_packets"),
        (DOCKER + fault(kind="delay", at="1s", delay="0ms"), "fault.0.delay: is 0 ms"),
        (DOCKER + fault(kind="rate", at="1s", rate="unlimited"), "fault.0.rate: is no limit"),
        (GUEST + fault(kind="kill", at="1s", what="dest_node", host="source"), "what = 'dest_node' is of the host"),
        (GUEST + fault(kind="kill", at="1s", what="dest_node", **{"for": "1s"}), "nothing without restart"),
        (GUEST + fault(kind="kill", at="1s", what="dest_node", restart=True), "fault.0.for: is missing"),
        (GUEST + '[link]\nrate = "1Gbit/s"\noffload = false\n', "link.rate: needs hosts.kind = 'docker'"),
        (DOCKER + "[link]\nloss = 2\n", "link.loss: 2 is not between 0% and 100%"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_path(text, told):
    assert told in problems(text)


def test_moments():
    assert moment_ms(parse_moment("500ms")) == 500
    assert moment_ms(parse_moment("2 s")) == 2000
    assert moment_ms(parse_moment(" round  1 50% ")) is None
    assert parse_moment(" round  1 50% ") == "round 1 50%"


@given(st.floats(0, 100))
def test_shares_are_percent_or_a_number(percent):
    assert parse_share(f"{percent:.4f}%") == pytest.approx(parse_share(percent / 100), abs=1e-6)


def test_a_link_is_made_of_faults():
    link = Link(rate="1Gbit/s", delay="10ms", loss="1%", offload=False)
    rate, delay, loss = link.faults()
    assert (rate.rate, rate.direction) == (125_000_000, "out")
    assert (delay.delay, delay.direction) == (10, "in")
    assert (loss.share, loss.direction) == (0.01, "in")
    assert link.shaped
    assert not Link().shaped
    assert Link().faults() == []


# -- what is chosen ------------------------------------------------------------------------------------


def test_the_same_seed_chooses_the_same_packets_and_exactly_the_share():
    assert chosen(0.01, 1) == chosen(0.01, 1) != chosen(0.01, 2)
    assert len(chosen(0.01, 3)) == round(0.01 * nft.CYCLE)
    assert len(chosen(1e-9, 3)) == 1


@pytest.mark.parametrize(
    ("share", "burst", "inside"), [(0.01, 10.0, 1.0), (0.05, 3.0, 0.5), (0.2, 50.0, 1.0)]
)
def test_bursts_have_the_share_and_the_length_that_were_asked_for(share, burst, inside):
    cycles = [gilbert_elliott(share, burst, inside, random.Random(seed)) for seed in range(20)]
    lost = sum(map(len, cycles)) / (20 * nft.CYCLE)
    assert lost == pytest.approx(share, rel=0.15)
    if inside == 1.0:
        lengths = [last - first + 1 for cycle in cycles for first, last in nft.runs_of(cycle)]
        assert sum(lengths) / len(lengths) == pytest.approx(burst, rel=0.15)


@given(st.sets(st.integers(0, 300)))
def test_runs_of_numbers_are_those_numbers(numbers):
    runs = nft.runs_of(sorted(numbers))
    assert {number for first, last in runs for number in range(first, last + 1)} == numbers
    assert all(later[0] > earlier[1] + 1 for earlier, later in pairwise(runs))


def checksum(data):
    total = 0
    padded = data + b"\0" * (len(data) % 2)
    for (word,) in struct.iter_unpack(">H", padded):
        total += word
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(protocol, payload):
    """An IPv4 packet with a right checksum."""
    source, dest = bytes([198, 18, 0, 1]), bytes([198, 18, 0, 2])
    if protocol == 6:
        head = bytearray(struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 16, 99, 0, 0))
        place = 16
    else:
        head = bytearray(struct.pack(">HHHH", 1, 2, 8 + len(payload), 0))
        place = 6
    pseudo = source + dest + bytes([0, protocol]) + (len(head) + len(payload)).to_bytes(2, "big")
    head[place : place + 2] = checksum(pseudo + bytes(head) + payload).to_bytes(2, "big")
    ip = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(head) + len(payload), 0, 0, 64, protocol, 0, source, dest
    )
    return ip + bytes(head) + payload


def is_right(packet):
    pseudo = packet[12:20] + bytes([0, packet[9]]) + (len(packet) - 20).to_bytes(2, "big")
    return checksum(pseudo + packet[20:]) in (0, 0xFFFF)


@given(st.sampled_from([6, 17]), st.binary(max_size=200), st.integers(0, 1000))
def test_one_bit_is_another_and_the_checksum_tells_unless_it_was_corrected(protocol, payload, seed):
    packet = segment(protocol, payload)
    assert is_right(packet)
    broken = corrupted(packet, random.Random(seed), fix_checksum=False)
    assert sum((a ^ b).bit_count() for a, b in zip(packet, broken, strict=True)) == 1
    assert not is_right(broken)
    fixed = corrupted(packet, random.Random(seed), fix_checksum=True)
    header = len(packet) - len(payload)
    assert is_right(fixed)
    assert (fixed[header:] != payload) is bool(payload)


@given(st.binary(max_size=60), st.booleans())
def test_whatever_a_packet_is_it_keeps_its_length(packet, fix):
    assert len(corrupted(packet, random.Random(1), fix_checksum=fix)) == len(packet)


# -- targets and descriptions ---------------------------------------------------------------------------


def test_directions_are_the_hosts_and_harm_where_packets_arrive():
    ports = [Port("source", 1, "198.18.0.2"), Port("dest", 2, "198.18.0.3"), Port("third", 3, "198.18.0.4")]
    target = Target({}, "dest", "label", 0, ports)
    assert [(port.origin, len(peers)) for port, peers in target.receivers("in")] == [("dest", 2)]
    out = [(port.origin, peers) for port, peers in target.receivers("out")]
    assert out == [("source", ["198.18.0.3"]), ("third", ["198.18.0.3"])]
    assert [port.origin for port in target.senders("both")] == ["dest", "source", "third"]


def test_a_description_heals_what_is_gone_without_a_complaint():
    gone = {"kind": "partition", "origin": "dest", "label": "x",
            "undo": {"tables": [{"pid": 2**22 + 1, "inode": 4026531840, "table": "x"}]}}  # fmt: skip
    assert healing_of(gone).heal() == {"packets": 0}
    assert healing_of(healing_of(gone).description).heal() == {"packets": 0}


# -- several at once, and judging -------------------------------------------------------------------------


class Bed:
    """Values of a host's that a fault sets and sets back, in words."""

    def __init__(self, monkeypatch):
        self.values = {"rate": None, "memory_bytes": 1 << 30, "cpus": 4.0}
        container = SimpleNamespace(
            alive=True,
            limits=lambda: Limits(self.values["memory_bytes"], self.values["cpus"]),
            limit=lambda **changed: self.values.update(changed),
        )
        hosts = {"dest": SimpleNamespace(origin="dest", container=container)}
        self.target = Target(hosts, "dest", "x", ports=[Port("dest", 1, "198.18.0.2")])
        monkeypatch.setattr(rate, "inode_of", lambda _: 7)
        monkeypatch.setattr(rate, "is_same_network", lambda *_: True)
        monkeypatch.setattr(qdisc, "limit", lambda _, __, bucket: self._set(bucket))
        monkeypatch.setattr(qdisc, "restore", lambda _, __, bucket: self._set(bucket))

    def _set(self, bucket):
        before, self.values["rate"] = self.values["rate"], bucket
        return before


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rate.rate", "rate", ("100Mbit/s", "1Mbit/s")),
        ("memory.limit", "memory_bytes", ("512MiB", "64MiB")),
        ("slow.cpus", "cpus", (2.0, 0.5)),
    ],
)
@pytest.mark.parametrize("healed_first", [0, 1])
def test_overlapping_faults_of_a_kind_leave_the_host_as_it_was(monkeypatch, key, value, wanted, healed_first):
    bed = Bed(monkeypatch)
    before = bed.values[value]
    kind, _, parameter = key.partition(".")
    a = apply(parse_fault(kind, {parameter: wanted[0]}), bed.target)
    of_a = bed.values[value]
    b = apply(parse_fault(kind, {parameter: wanted[1]}), bed.target)
    of_b = bed.values[value]
    if healed_first == 0:
        a.heal(bed.target.hosts, [b])
        assert bed.values[value] == of_b, "the later one is in force"
        b.heal(bed.target.hosts)
    else:
        b.heal(bed.target.hosts)
        assert bed.values[value] == of_a
        a.heal(bed.target.hosts)
    assert bed.values[value] == before


def test_a_node_that_waited_in_vain_makes_the_run_unknown():
    applied = Event(1, "testbed", "fault_applied", {"fault": 0})
    alone = Event(
        2, "dest", "point_released", {"point": "prepare.received", "why": "nobody came within 30000 ms"}
    )
    events = {"fault_applied": [applied], "point_released": [alone]}
    scenario = parse(GUEST + fault(kind="pause", what="dest_node", at="prepare.received"), default_name="x")
    record = SimpleNamespace(scenario=scenario, all=lambda name: iter(events.get(name, [])))
    finding = checker.check(record)
    assert finding.reasons == ("the dest went on from 'prepare.received' without its fault",)


def test_a_kind_says_how_it_is_applied_and_healed():
    with pytest.raises(TypeError, match="abstract method"):
        Fault(kind="x")
