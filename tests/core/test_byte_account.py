"""The account of bytes: figures made by hand, layer by layer, and what no layer explains."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.analysis.account import Account, Counts, explain
from testbed.analysis.framing import FIXED_BYTES, TLS_OVERHEAD_BYTES, TLS_RECORD_BYTES
from testbed.checkers import byte_count
from testbed.checkers.verdict import Verdict
from testbed.record.run_record import load
from testbed.record.testing import SyntheticRun
from testbed.report.account_table import account_table
from tests.core.test_testbed_checkers import drop, edit_fields

# 1000 data pages in 4 messages of 16 + 4104 per page, and 800 bytes of control calls.
PAYLOAD = 1000 * 4096
CHUNKS = 1000 * 8 + 4 * 64
PREFIXES = 4 * 5
CONTROL = 800
GRPC = PAYLOAD + CHUNKS + PREFIXES + CONTROL
FRAMES = 9 * 260 + 500
STREAM = GRPC + FRAMES
BY_TCP = Counts(
    payload=PAYLOAD, grpc=GRPC, control=CONTROL, messages=4, data_pages=1000, zero_pages=0, rounds=2,
    encoded=PAYLOAD,
    tcp={"tx_bytes": STREAM, "rx_bytes": 900, "retransmitted_bytes": 0, "tx_segments": 2900, "unheard": 0},
)  # fmt: skip
PACKETS, PACKETS_BACK = 100, 60
FRAMING = 20 + 32 + 14
BY_INTERFACE = replace(
    BY_TCP,
    interface={
        "tx_bytes": STREAM + PACKETS * FRAMING, "tx_packets": PACKETS,
        "rx_bytes": 900 + PACKETS_BACK * FRAMING, "rx_packets": PACKETS_BACK,
        "offload": True, "mtu_bytes": 1500,
    },
)  # fmt: skip


def layers(account: Account):
    return {layer.name.partition(":")[0]: layer.forward_bytes for layer in account.layers}


def told(counts, **tcp):
    return replace(counts, tcp={**counts.tcp, **tcp})


def crossed(counts, **interface):
    return replace(counts, interface={**counts.interface, **interface})


def test_every_byte_of_a_tcp_account_has_its_layer():
    account = explain(BY_TCP)
    assert account.problems == []
    assert {layer.name: layer.forward_bytes for layer in account.layers} == {
        "page payload": PAYLOAD,
        "protobuf: page hashes, runs, chunk headers": CHUNKS,
        "protobuf: control calls": CONTROL,
        "gRPC: message prefixes": PREFIXES,
        "HTTP/2: frames, headers, answers": FRAMES,
    }
    assert account.wire_forward_bytes == STREAM


def test_the_figures_of_a_real_gibibyte_are_explained():
    """263 138 data pages in two rounds, arm none, one stream over loopback, as once measured."""
    counted = replace(
        BY_TCP, payload=263_138 * 4096, encoded=263_138 * 4096, data_pages=263_138, messages=1031,
        control=1500, grpc=1_079_994_057,
        tcp={**BY_TCP.tcp, "tx_bytes": 1_080_641_365, "rx_bytes": 45_000},
    )  # fmt: skip
    assert explain(counted).problems == []


def test_an_interface_adds_tcp_ip_and_ethernet_headers_per_packet():
    account = explain(BY_INTERFACE)
    assert account.problems == []
    assert account.unexplained_forward_bytes == account.unexplained_backward_bytes == 0
    assert layers(account)["TCP/IP"] == PACKETS * 52
    assert layers(account)["Ethernet"] == PACKETS * 14
    assert account.cable_forward_bytes == STREAM + 2900 * FRAMING, "what no interface with offload shows"


@pytest.mark.parametrize("factor", [0.985, 1.015])
def test_more_than_one_percent_is_not_explained(factor):
    wire = BY_INTERFACE.interface["tx_bytes"]
    counted = crossed(BY_INTERFACE, tx_bytes=int(wire * factor) + (1 if factor > 1 else -1) * FIXED_BYTES)
    (problem,) = explain(counted).problems
    assert "on the wire to the destination" in problem
    assert "unexplained" in problem


@pytest.mark.parametrize("factor", [0.995, 1.005])
def test_less_than_one_percent_is_shown_and_tolerated(factor):
    wire = BY_INTERFACE.interface["tx_bytes"]
    account = explain(crossed(BY_INTERFACE, tx_bytes=int(wire * factor)))
    assert account.problems == []
    # What is missing may be missing from HTTP/2, which nobody counts.
    nobodys = FRAMES if factor < 1 else 0
    assert layers(account)["unexplained"] == int(wire * factor) - wire + nobodys


def test_a_stream_that_carried_what_no_message_asked_for_is_not_explained():
    counted = told(BY_TCP, tx_bytes=int(STREAM * 1.03))
    assert any("unexplained" in problem for problem in explain(counted).problems)


def test_messages_that_are_more_than_pages_make_are_told():
    counted = replace(BY_TCP, grpc=GRPC + 400_000)
    assert any("page hashes" in problem for problem in explain(counted).problems)


def test_messages_that_are_less_than_their_pages_are_told():
    counted = told(replace(BY_TCP, grpc=GRPC - 400_000), tx_bytes=STREAM - 400_000)
    assert any("page hashes" in problem for problem in explain(counted).problems)


def test_retransmitted_bytes_are_a_layer():
    counted = crossed(
        told(BY_INTERFACE, tx_bytes=STREAM + 70_000, retransmitted_bytes=70_000),
        tx_bytes=STREAM + 70_000 + (PACKETS + 2) * FRAMING, tx_packets=PACKETS + 2,
    )  # fmt: skip
    account = explain(counted)
    assert account.problems == []
    assert layers(account)["TCP"] == 70_000
    assert account.retransmitted_bytes == 70_000


def test_what_was_dropped_before_the_interface_crossed_it_only_once():
    """A queue's or a rule's drop: sent twice for TCP, once for the counter."""
    counted = told(BY_INTERFACE, tx_bytes=STREAM + 200_000, retransmitted_bytes=200_000)
    account = explain(counted)
    assert account.problems == []
    assert "TCP" not in layers(account)


def test_what_tcp_counted_while_there_was_no_interface_never_left():
    """It counts the same bytes each time that it tries to hand them on, and does not call that a retransmission."""
    tried = told(BY_INTERFACE, tx_bytes=STREAM + 300_000)
    account = explain(tried)
    assert account.problems == []
    assert "unexplained" not in layers(account)


def test_what_was_dropped_before_the_interface_with_its_connection_is_explained_by_what_went_again():
    """A rule dropped it, and the connection was reset before TCP would have sent it once more."""
    dropped = 130_000
    pages = 200
    again = pages * (4096 + 8)
    resumed = replace(
        crossed(BY_INTERFACE, tx_bytes=BY_INTERFACE.interface["tx_bytes"] + again - dropped),
        grpc=GRPC + again, resent_pages=pages,
    )  # fmt: skip
    resumed = told(resumed, tx_bytes=STREAM + again)
    account = explain(resumed)
    assert account.problems == []
    assert layers(account)["given to a connection that was lost"] == FRAMES - dropped
    nobody_resent = explain(replace(resumed, resent_pages=0, grpc=GRPC))
    assert nobody_resent.problems


def test_retransmissions_do_not_excuse_other_bytes():
    counted = crossed(
        told(BY_INTERFACE, tx_bytes=STREAM + 1000, retransmitted_bytes=1000),
        tx_bytes=int(BY_INTERFACE.interface["tx_bytes"] * 1.03),
    )
    assert explain(counted).problems


def test_tls_is_a_layer_of_whole_records():
    records = GRPC // TLS_RECORD_BYTES
    added = records * TLS_OVERHEAD_BYTES + 3000
    account = explain(told(replace(BY_TCP, tls=True), tx_bytes=STREAM + added))
    assert account.problems == []
    assert layers(account)["TLS"] == records * TLS_OVERHEAD_BYTES


def test_compression_takes_its_bytes_off():
    saved = 3_000_000
    counted = replace(told(BY_TCP, tx_bytes=STREAM - saved), grpc=GRPC - saved, encoded=PAYLOAD - saved)
    account = explain(counted)
    assert account.problems == []
    assert layers(account)["compression"] == -saved
    assert account.wire_forward_bytes == STREAM - saved


def test_pages_sent_again_after_a_lost_connection_are_explained_by_their_number():
    """64 pages went again; half of what was lost with the connection had not left it."""
    again, kept_back = 64 * 4096, 30 * 4096
    counted = told(
        replace(BY_TCP, grpc=GRPC + again + 64 * 8, resent_pages=64), tx_bytes=STREAM + again - kept_back
    )
    account = explain(counted)
    assert account.problems == []
    assert abs(layers(account)["pages sent again after a loss"] - again) < 1000
    assert layers(account)["given to a connection that was lost"] < 0


def test_pages_that_were_never_given_to_grpc_are_not_counted_as_sent_again():
    """The chunks that were read and not yet sent when the connection went are in the number of pages, too."""
    account = explain(replace(BY_TCP, resent_pages=64))
    assert account.problems == []
    assert "pages sent again after a loss" not in layers(account)


def test_frames_that_a_bridge_sends_back_are_bounded_by_what_was_lost():
    """Measured with a container taken off its network: the engine's bridge ports hairpin."""
    lost = told(replace(BY_INTERFACE, resent_pages=200), retransmitted_bytes=0)
    returned = crossed(lost, rx_bytes=BY_INTERFACE.interface["rx_bytes"] + 600_000)
    assert explain(returned).problems == []
    more = crossed(lost, rx_bytes=BY_INTERFACE.interface["rx_bytes"] + 1_200_000)
    assert any("from the destination" in problem for problem in explain(more).problems)


def test_other_connections_of_the_host_are_no_mystery():
    counted = replace(
        crossed(BY_INTERFACE, tx_bytes=BY_INTERFACE.interface["tx_bytes"] + 90_000),
        others={"tx_bytes": 90_000, "rx_bytes": 0},
    )
    account = explain(counted)
    assert account.problems == []
    assert layers(account)["other connections of the host"] == 90_000


def test_a_connection_that_ended_unheard_is_told():
    (problem,) = explain(told(BY_TCP, unheard=1)).problems
    assert "without their last count" in problem


def test_the_table_shows_every_layer_and_the_sum():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(account_table(explain(BY_INTERFACE)))
    shown = console.export_text()
    for word in (
        "page payload",
        "TCP/IP",
        "Ethernet",
        "counted at the interface",
        "100.00 %",
        "offload is on",
    ):
        assert word in shown


# -- from a record ---------------------------------------------------------------------------------


def with_interface(run, dest_received=None, streams=None, **changed):
    """Turns a synthetic run's counts into those of a host with an interface.

    `streams` changes what the destination's TCP streams carried; False: it told nothing of them.
    """
    record = load(run.run_dir.path)
    told_bytes = dict(record.ended.fields["bytes"])
    stream = told_bytes["tcp"]["tx_bytes"]
    interface = {
        "tx_bytes": stream + 50 * FRAMING, "tx_packets": 50, "rx_bytes": 1000 + 40 * FRAMING,
        "rx_packets": 40, "offload": True, "mtu_bytes": 1500, **changed,
    }  # fmt: skip
    told_bytes |= {"interface": interface, "wire_source": "interface", "wire_tx": interface["tx_bytes"]}
    edit_fields(run, "migration_ended", bytes=told_bytes)
    received = interface["tx_bytes"] if dest_received is None else dest_received
    fields = {"rx_bytes": received, "tx_bytes": interface["rx_bytes"], "rx_packets": 50, "tx_packets": 40}
    tcp = told_bytes["tcp"]
    if streams is not False:
        carried = {"rx_bytes": tcp["tx_bytes"] - tcp["retransmitted_bytes"], "tx_bytes": tcp["rx_bytes"]}
        fields["streams"] = {**carried, "retransmitted_bytes": 0, **(streams or {})}
    tell(run, 1050, "dest", "wire_received", attempt="synthetic#1@1", **fields)
    tell(
        run, 1060, "testbed", "wire_seen", by="source", hosts={"source": {**interface, "interfaces_gone": 0}}
    )
    return load(run.run_dir.path)


def tell(run, at_ms, origin, name, **fields):
    line = {"at_ns": at_ms * 1_000_000, "origin": origin, "name": name, "fields": fields}
    with run.run_dir.events.open("a") as events:
        events.write(json.dumps(line) + "\n")


def killed(run, at_ms, host, what):
    fields = {"fault": 1, "kind": "kill", "host": host, "parameters": {"what": what}}
    tell(run, at_ms, "testbed", "fault_applied", **fields)


def test_both_ends_agree(tmp_path):
    finding = byte_count.check(with_interface(SyntheticRun(tmp_path)))
    assert (finding.verdict, finding.reasons) == (Verdict.VALID, ())


@pytest.mark.parametrize(
    ("difference", "words"), [(-200_000, "are missing"), (200_000, "came from elsewhere")]
)
def test_ends_that_disagree_are_unknown(tmp_path, difference, words):
    run = SyntheticRun(tmp_path)
    sent = load(run.run_dir.path).ended.fields["bytes"]["tcp"]["tx_bytes"] + 50 * FRAMING
    finding = byte_count.check(with_interface(run, dest_received=sent + difference))
    assert finding.verdict is Verdict.UNKNOWN
    assert words in finding.reasons[0]


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        ({"rx_bytes": 10}, "bytes of TCP streams left to the destination and 10 arrived"),
        ({"tx_bytes": 90_000}, "90000 bytes of TCP streams left from the destination"),
    ],
)
def test_streams_that_disagree_are_unknown(tmp_path, streams, words):
    finding = byte_count.check(with_interface(SyntheticRun(tmp_path), streams=streams))
    assert finding.verdict is Verdict.UNKNOWN
    assert any(words in reason for reason in finding.reasons), finding.reasons


def relayed(run):
    """Two engines: the hosts' networks are joined by something that ends TCP."""
    for subnet in ("198.18.1.0/24", "198.18.2.0/24"):
        tell(run, 10, "testbed", "network_made", network="n", subnet=subnet, internal=False)


def test_what_a_relay_sent_again_is_no_byte_from_elsewhere(tmp_path):
    run = SyntheticRun(tmp_path)
    sent = load(run.run_dir.path).ended.fields["bytes"]["tcp"]["tx_bytes"] + 50 * FRAMING
    relayed(run)
    assert byte_count.check(with_interface(run, dest_received=sent + 200_000)).verdict is Verdict.VALID


@pytest.mark.parametrize(
    ("streams", "words"),
    [({"rx_bytes": 10}, "are missing"), (False, "no counts of its TCP streams: the two ends cannot")],
)
def test_behind_a_relay_the_streams_are_compared(tmp_path, streams, words):
    run = SyntheticRun(tmp_path)
    relayed(run)
    finding = byte_count.check(with_interface(run, streams=streams))
    assert finding.verdict is Verdict.UNKNOWN
    assert any(words in reason for reason in finding.reasons), finding.reasons


def duplicating(run, begins_ms, ends_ms=None):
    fields = {"fault": 0, "kind": "duplicate", "host": "dest"}
    tell(run, begins_ms, "testbed", "fault_applied", **fields, parameters={})
    if ends_ms is not None:
        tell(run, ends_ms, "testbed", "fault_healed", **fields)


@pytest.mark.parametrize("healed_at_ms", [None, 2000])
def test_copies_of_packets_are_no_bytes_from_elsewhere(tmp_path, healed_at_ms):
    run = SyntheticRun(tmp_path)
    sent = load(run.run_dir.path).ended.fields["bytes"]["tcp"]["tx_bytes"] + 50 * FRAMING
    duplicating(run, 20, healed_at_ms)
    assert byte_count.check(with_interface(run, dest_received=sent + 200_000)).verdict is Verdict.VALID


def test_copies_from_before_the_attempt_excuse_nothing(tmp_path):
    run = SyntheticRun(tmp_path)
    sent = load(run.run_dir.path).ended.fields["bytes"]["tcp"]["tx_bytes"] + 50 * FRAMING
    duplicating(run, 1, 2)
    finding = byte_count.check(with_interface(run, dest_received=sent + 200_000))
    assert "came from elsewhere" in finding.reasons[0]


def test_copies_that_came_back_have_a_layer_bounded_by_their_originals():
    answers, once = 9000, 9000 + PACKETS_BACK * FRAMING
    twice = crossed(told(BY_INTERFACE, rx_bytes=answers), rx_bytes=2 * once, rx_packets=2 * PACKETS_BACK)
    twice = replace(twice, duplicated=True)
    (copies,) = [layer for layer in explain(twice).layers if layer.name == "packets that came twice"]
    assert 0 < copies.backward_bytes <= answers
    assert explain(twice).problems == []
    too_many = crossed(twice, rx_bytes=400_000)
    assert any("from the destination" in problem for problem in explain(too_many).problems)


def test_packets_larger_than_the_mtu_without_offload_are_unknown(tmp_path):
    finding = byte_count.check(with_interface(SyntheticRun(tmp_path), offload=False))
    assert finding.verdict is Verdict.UNKNOWN
    assert "fit without offload" in finding.reasons[0]


@pytest.mark.parametrize(
    ("missing", "words"), [("wire_received", "two ends cannot be compared"), ("wire_seen", "nobody outside")]
)
def test_counts_without_their_other_witness_are_unknown(tmp_path, missing, words):
    run = SyntheticRun(tmp_path)
    with_interface(run)
    drop(run, missing)
    finding = byte_count.check(load(run.run_dir.path))
    assert finding.verdict is Verdict.UNKNOWN
    assert words in finding.reasons[0]


def test_another_machine_cannot_be_looked_at_from_here(tmp_path):
    run = SyntheticRun(tmp_path)
    with_interface(run)
    drop(run, "wire_seen")
    tell(run, 710, "testbed", "wire_unseen", host="source", reason="it is on another machine", elsewhere=True)
    assert byte_count.check(load(run.run_dir.path)).verdict is Verdict.VALID


def test_counts_of_an_earlier_attempt_are_no_witness_of_this_one(tmp_path):
    run = SyntheticRun(tmp_path)
    with_interface(run)
    edit_fields(run, "migration_requested", attempt=2)
    finding = byte_count.check(load(run.run_dir.path))
    assert any("two ends cannot be compared" in reason for reason in finding.reasons)


def test_a_destination_that_a_fault_killed_took_its_counts_with_it(tmp_path):
    run = SyntheticRun(tmp_path)
    with_interface(run)
    drop(run, "wire_received")
    killed(run, 900, "dest", "source_node")  # a node is called by what it was in the run, this is a leg back
    assert byte_count.check(load(run.run_dir.path)).verdict is Verdict.VALID


def test_a_sender_killed_in_an_earlier_attempt_excuses_nothing_in_the_last_one(tmp_path):
    run = SyntheticRun(tmp_path, fault="wire_miscounted")
    killed(run, 650, "source", "source_node")
    assert byte_count.check(load(run.run_dir.path)).verdict is Verdict.UNKNOWN
    killed(run, 900, "source", "source_node")
    assert byte_count.check(load(run.run_dir.path)).verdict is Verdict.VALID


def test_a_source_with_a_network_of_its_own_must_count_its_interfaces(tmp_path):
    run = SyntheticRun(tmp_path)
    tell(
        run,
        1060,
        "testbed",
        "wire_seen",
        by="source",
        hosts={"source": {"tx_bytes": 1, "interfaces_gone": 0}},
    )
    finding = byte_count.check(load(run.run_dir.path))
    assert "told no counts of its interfaces" in finding.reasons[0]
