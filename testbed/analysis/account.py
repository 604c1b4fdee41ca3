"""The account of a migration's bytes: what every layer put on the wire, and what nobody can explain.

Rule 1: it is a pure function of what was recorded: the nodes' counts, explained by the framing model (framing.py).
Rule 2: a layer is `counted` where somebody counted it, `modelled` where the protocol fixes it from what was
        counted, and `rest` where it is what remains between two counts and the model only bounds it.
Rule 3: forward is source to destination, backward the other way, both as the source's side of the wire counts.
Rule 4: what the model cannot explain is a line of its own and, beyond 1 %, a problem in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field

from testbed.analysis.framing import (
    CHUNK_HEADER_BYTES,
    ETHERNET_HEADER_BYTES,
    FIXED_BYTES,
    GRPC_PREFIX_BYTES,
    PAGE_HASH_BYTES,
    RUN_BYTES_MAX,
    SACK_BYTES_MAX,
    TOLERANCE,
    answer_bounds,
    chunk_bounds,
    http2_bounds,
    packet_header_bytes,
    tls_bounds,
    tolerated,
)
from testbed.documents import Part
from testbed.units import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from testbed.record.run_record import RunRecord

Source = Literal["counted", "modelled", "rest"]
OUTSIDE_TOLERANCE: Final = (
    0.01  # what the nodes count against what is read from outside, in the same interval
)


class Layer(Part):
    """One layer's share of the bytes. A negative one takes off what the layer above put on."""

    name: str
    how: Source
    forward_bytes: int = 0
    backward_bytes: int = 0


class Account(Part):
    """The bytes of one migration, layer by layer; they sum up to what was counted on the wire."""

    wire_source: Literal["interface", "tcp_info"] = "tcp_info"
    layers: list[Layer] = Field(default_factory=list)
    wire_forward_bytes: int = 0
    wire_backward_bytes: int = 0
    unexplained_forward_bytes: int = 0
    unexplained_backward_bytes: int = 0
    packets_forward: int = 0  # as the interface is handed them; 0 where no interface counts
    packets_backward: int = 0
    offload: bool | None = None  # segmentation offload: packets may be larger than the MTU
    cable_forward_bytes: int = 0  # what a cable would carry: every segment with its own headers
    retransmitted_bytes: int = 0
    dest_received_bytes: int | None = None  # the same bytes at the destination's interfaces
    dest_sent_bytes: int | None = None
    dest_stream_bytes: int | None = None  # of them the TCP streams' own, each byte once
    problems: list[str] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the account is made of; bytes as in the source's migration_ended."""

    payload: int
    grpc: int
    control: int
    messages: int
    data_pages: int
    zero_pages: int
    rounds: int
    tcp: Mapping[str, int]
    encoded: int  # page data as it stands in the messages: less than the payload where it was compressed
    resent_pages: int = 0
    tls: bool = False
    ip_version: int = 4
    interface: Mapping[str, Any] | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    dest: Mapping[str, Any] | None = None
    relayed: bool = False  # the hosts have networks of their own, and something between them ends TCP
    duplicated: bool = False  # a fault had packets arrive twice

    @classmethod
    def of(cls, record: RunRecord) -> Counts | None:
        """From a record; None when the source told no counts."""
        told = record.ended.fields.get("bytes") if record.ended is not None else None
        if not told or "tcp" not in told:
            return None
        rounds = [event.fields for event in record.rounds]
        received = [*record.arrived("round_received"), *record.arrived("wire_received")]
        payload = int(told["payload"])
        return cls(
            payload=payload,
            grpc=int(told["grpc"]),
            control=int(told.get("control", 0)),
            messages=int(told.get("messages", 0)),
            data_pages=payload // PAGE_BYTES,
            zero_pages=sum(int(entry["zero_pages"]) for entry in rounds),
            rounds=len(rounds),
            tcp=told["tcp"],
            encoded=int(told.get("encoded", payload)),
            resent_pages=int(told.get("resent_pages", 0)),
            tls=bool(told.get("tls", False)),
            ip_version=int(told.get("ip_version", 4)),
            interface=told.get("interface"),
            others=told.get("others") or {},
            dest=received[-1].fields if received else None,
            relayed=record.networks > 1,
            duplicated=record.was_in_force("duplicate"),
        )


def account_of(record: RunRecord) -> Account | None:
    """The account of a recorded migration; None when nothing was counted."""
    counts = Counts.of(record)
    if counts is None:
        return None
    account = explain(counts)
    problems = [
        *account.problems,
        *_link_problems(account, counts, offload=record.scenario.link.offload),
        *_outside_problems(record),
        *_missing_witnesses(record, counts),
    ]
    return account.model_copy(update={"problems": problems})


def dest_bytes_of_rounds(record: RunRecord) -> dict[int, int]:
    """What reached the destination's interfaces in each round of the newest attempt, by the round's index."""
    newest = [event.fields for event in record.arrived("round_received")]
    ends = {int(fields["round"]): int(fields["rx_bytes"]) for fields in newest}  # of several streams the last
    before = dict(zip(list(ends)[1:], list(ends.values())[:-1], strict=True))
    return {index: end - before.get(index, 0) for index, end in ends.items()}


def explain(counts: Counts) -> Account:
    """Every layer, and what is left over."""
    layers, problems = [], []
    stream_layers, surplus, stream_problems = _stream(counts)
    layers += stream_layers
    problems += stream_problems
    retransmitted = counts.tcp["retransmitted_bytes"]
    if counts.interface is None:
        layers.append(Layer(name="TCP: sent again", how="counted", forward_bytes=retransmitted))
        forward, backward = counts.tcp["tx_bytes"], counts.tcp["rx_bytes"]
        rest_forward, rest_backward = surplus, 0
    else:
        below, rest_forward, rest_backward = _below_tcp(counts, counts.interface)
        layers += below
        rest_forward += surplus
        forward, backward = counts.interface["tx_bytes"], counts.interface["rx_bytes"]
    answers = answer_bounds(counts.grpc, counts.messages).excess(counts.tcp["rx_bytes"])
    if answers:
        problems.append(
            f"{counts.messages} messages are answered with {counts.tcp['rx_bytes']} bytes of TCP stream, "
            f"{answers} more than answers can be"
        )
    for way, rest, wire in (("to", rest_forward, forward), ("from", rest_backward, backward)):
        if abs(rest) > tolerated(wire):
            share = f" ({rest / wire:+.1%})" if wire else ""
            problems.append(
                f"{rest:+} of {wire} bytes on the wire {way} the destination{share} are unexplained"
            )
    if counts.tcp.get("unheard"):
        problems.append(f"{counts.tcp['unheard']} connections ended without their last count")
    layers.append(
        Layer(name="unexplained", how="rest", forward_bytes=rest_forward, backward_bytes=rest_backward)
    )
    assert sum(layer.forward_bytes for layer in layers) == forward, layers
    return Account(
        wire_source="tcp_info" if counts.interface is None else "interface",
        layers=[layer for layer in layers if layer.forward_bytes or layer.backward_bytes],
        wire_forward_bytes=forward,
        wire_backward_bytes=backward,
        unexplained_forward_bytes=rest_forward,
        unexplained_backward_bytes=rest_backward,
        packets_forward=counts.interface["tx_packets"] if counts.interface else 0,
        packets_backward=counts.interface["rx_packets"] if counts.interface else 0,
        offload=counts.interface.get("offload") if counts.interface else None,
        cable_forward_bytes=_on_a_cable(counts),
        retransmitted_bytes=retransmitted,
        dest_received_bytes=counts.dest["rx_bytes"] if counts.dest else None,
        dest_sent_bytes=counts.dest["tx_bytes"] if counts.dest else None,
        dest_stream_bytes=(counts.dest.get("streams") or {}).get("rx_bytes") if counts.dest else None,
        problems=problems,
    )


def _stream(counts: Counts) -> tuple[list[Layer], int, list[str]]:
    """Layers down to the TCP stream, each byte once; what the bounds leave over; what they contradict."""
    problems = []
    prefixes = counts.messages * GRPC_PREFIX_BYTES
    beyond = counts.grpc - counts.control - prefixes - counts.encoded
    allowed = chunk_bounds(counts.data_pages, counts.zero_pages, counts.rounds, counts.messages)
    # A page of a lost chunk went again as data, or was zero by then, or had not been given to gRPC at all.
    least_chunks = allowed.least + counts.messages * CHUNK_HEADER_BYTES
    resent = min(_resent_most(counts), max(0, beyond - least_chunks))
    chunks = beyond - resent
    if allowed.excess(chunks) > 0 or chunks < allowed.least - tolerated(counts.encoded):
        problems.append(
            f"{counts.payload} bytes of payload make {allowed.least} to {allowed.most} bytes of page hashes, runs "
            f"and chunk headers, counted {chunks}"
        )
    stream = _left_the_host(counts)
    tls = tls_bounds(counts.grpc, counts.messages) if counts.tls else None
    # What was given to a connection before it was lost, and was sent again on the next one.
    lost = -min(_resent_most(counts), max(0, counts.grpc + (tls.least if tls else 0) - stream))
    below = stream - counts.grpc - lost
    tls_bytes = min(max(below, 0), tls.least) if tls is not None else 0
    http2_most = http2_bounds(counts.grpc, counts.messages).most + (tls.most - tls.least if tls else 0)
    http2 = min(max(below - tls_bytes, 0), http2_most)
    surplus = below - tls_bytes - http2
    layers = [
        Layer(name="page payload", how="counted", forward_bytes=counts.payload),
        Layer(name="compression", how="counted", forward_bytes=counts.encoded - counts.payload),
        Layer(name="pages sent again after a loss", how="rest", forward_bytes=resent),
        Layer(name="protobuf: page hashes, runs, chunk headers", how="counted", forward_bytes=chunks),
        Layer(name="protobuf: control calls", how="counted", forward_bytes=counts.control),
        Layer(name="gRPC: message prefixes", how="modelled", forward_bytes=prefixes),
        Layer(name="given to a connection that was lost", how="rest", forward_bytes=lost),
        Layer(name="TLS: records", how="modelled", forward_bytes=tls_bytes),
        Layer(
            name="HTTP/2: frames, headers, answers",
            how="rest",
            forward_bytes=http2,
            backward_bytes=counts.tcp["rx_bytes"],
        ),
    ]
    return layers, surplus, problems


def _left_the_host(counts: Counts) -> int:
    """The TCP streams, each byte once, as far as an interface carried them.

    TCP counts what it hands on: while there is no interface it counts the same bytes each time that it tries, and
    what was dropped on the way to one, of a connection that then broke, it never sent again.
    """
    stream = counts.tcp["tx_bytes"] - counts.tcp["retransmitted_bytes"]
    if counts.interface is None:
        return stream
    framing = packet_header_bytes(counts.ip_version) + ETHERNET_HEADER_BYTES
    headers = counts.interface["tx_packets"] * framing
    return int(min(stream, counts.interface["tx_bytes"] - headers - counts.others.get("tx_bytes", 0)))


def _below_tcp(counts: Counts, interface: Mapping[str, Any]) -> tuple[list[Layer], int, int]:
    """Layers between the TCP stream and the interface; what is left over forward and backward."""
    tx_packets, rx_packets = interface["tx_packets"], interface["rx_packets"]
    per_packet = packet_header_bytes(counts.ip_version)
    others = (counts.others.get("tx_bytes", 0), counts.others.get("rx_bytes", 0))
    framing = per_packet + ETHERNET_HEADER_BYTES
    left = interface["tx_bytes"] - _left_the_host(counts) - tx_packets * framing - others[0]
    # A packet that was dropped before the interface (a queue, a rule) was sent for TCP and not for the counter.
    again = min(left, counts.tcp["retransmitted_bytes"])
    left_back = interface["rx_bytes"] - counts.tcp["rx_bytes"] - rx_packets * framing - others[1]
    # While something is missing, or came twice, acknowledgements name it, and the peer repeats itself, too.
    irregular = counts.tcp["retransmitted_bytes"] or counts.duplicated
    sack_most = rx_packets * SACK_BYTES_MAX if irregular else 0
    returned = _returned(counts, left_back, interface["rx_bytes"])
    sack = min(max(left_back - returned, 0), sack_most)
    # A copy comes beside its original: of all that was received at most one half.
    copies_most = interface["rx_bytes"] // 2 if counts.duplicated else 0
    copies = min(max(left_back - returned - sack, 0), copies_most)
    layers = [
        Layer(name="TCP: sent again", how="counted", forward_bytes=again),
        Layer(
            name="TCP/IP: packet headers",
            how="modelled",
            forward_bytes=tx_packets * per_packet,
            backward_bytes=rx_packets * per_packet + sack,
        ),
        Layer(
            name="Ethernet: frame headers",
            how="modelled",
            forward_bytes=tx_packets * ETHERNET_HEADER_BYTES,
            backward_bytes=rx_packets * ETHERNET_HEADER_BYTES,
        ),
        Layer(name="frames that a bridge sent back", how="rest", backward_bytes=returned),
        Layer(name="packets that came twice", how="rest", backward_bytes=copies),
        Layer(
            name="other connections of the host",
            how="counted",
            forward_bytes=others[0],
            backward_bytes=others[1],
        ),
    ]
    return layers, left - again, left_back - sack - returned - copies


def _resent_most(counts: Counts) -> int:
    """Bytes of the messages with pages that went again because a connection was lost."""
    return counts.resent_pages * (PAGE_BYTES + PAGE_HASH_BYTES + RUN_BYTES_MAX)


def _returned(counts: Counts, left_back: int, received: int) -> int:
    """Own frames that came back: a bridge that has lost a host sends what is for it to every port.

    At most as many as were lost, and as many as the destination did not send itself, where it counts.
    """
    sent = counts.dest["tx_bytes"] if counts.dest else received - left_back
    surplus = received - sent
    return min(surplus, _lost_on_the_way(counts)) if surplus > tolerated(sent) else 0


def _lost_on_the_way(counts: Counts) -> int:
    """At most so many bytes left one host and did not reach the other: they were sent again, by TCP or by us."""
    return int((counts.tcp["retransmitted_bytes"] + _resent_most(counts)) * (1 + TOLERANCE))


def _on_a_cable(counts: Counts) -> int:
    """Every segment with its own headers: what the interface would count without offload."""
    headers = packet_header_bytes(counts.ip_version) + ETHERNET_HEADER_BYTES
    return counts.tcp["tx_bytes"] + counts.tcp.get("tx_segments", 0) * headers


def _link_problems(account: Account, counts: Counts, *, offload: bool) -> Iterator[str]:
    interface = counts.interface
    if interface is None:
        return
    if not offload and account.offload:
        yield "link.offload = false, and the interface is handed packets larger than its MTU all the same"
    if account.packets_forward and account.offload is False:
        mean = account.wire_forward_bytes / account.packets_forward
        largest = int(interface.get("mtu_bytes", 0)) + ETHERNET_HEADER_BYTES
        if largest > ETHERNET_HEADER_BYTES and mean > largest:
            yield f"a packet has {mean:.0f} bytes on average and at most {largest} fit without offload"
    for what, sent, received in _both_ends(account, counts):
        missing, most = sent - received, tolerated(sent)
        if missing > most + _lost_on_the_way(counts):
            yield f"{sent} {what} the destination and {received} arrived: {missing} are missing"
        elif -missing > most:
            yield f"{sent} {what} the destination and {received} arrived: {-missing} came from elsewhere"


def _both_ends(account: Account, counts: Counts) -> Iterator[tuple[str, int, int]]:
    """(what, sent at one end, received at the other): the same, but for what was lost on the way and sent again.

    A relay's packets are its own, and what it sent again nobody else knows of; copies of packets are nobody's. Then
    only the TCP streams are the same at both ends.
    """
    if counts.dest is None:
        return
    if streams := counts.dest.get("streams"):
        answered = streams["tx_bytes"] - streams["retransmitted_bytes"]
        yield "bytes of TCP streams left to", _left_the_host(counts), streams["rx_bytes"]
        yield "bytes of TCP streams left from", answered, counts.tcp["rx_bytes"]
    if not (counts.relayed or counts.duplicated):
        returned = sum(
            layer.backward_bytes for layer in account.layers if layer.name.startswith("frames that")
        )
        yield "bytes left to", account.wire_forward_bytes, counts.dest["rx_bytes"]
        yield "bytes left from", counts.dest["tx_bytes"], account.wire_backward_bytes - returned


def _outside_problems(record: RunRecord) -> Iterator[str]:
    """The same counters read from outside the hosts (meters.py) may not say less than the nodes do."""
    ended = record.ended
    interface = ended.fields["bytes"].get("interface") if ended is not None else None
    counted = _seen_from_outside(record)
    if interface is None or counted is None or counted.get("interfaces_gone"):
        return  # an interface that went took counts with it that only the node heard of
    inside, outside = int(interface["tx_bytes"]), int(counted["tx_bytes"])
    if abs(outside - inside) > inside * OUTSIDE_TOLERANCE + 2 * FIXED_BYTES:
        yield f"the source counted {inside} bytes at its interfaces, and {outside} were read from outside"


def _missing_witnesses(record: RunRecord, counts: Counts) -> Iterator[str]:
    """Where interfaces count, both ends and somebody outside must have: one witness alone agrees with itself.

    What a fault killed took its counts with it, and a host of another machine cannot be looked at from here.
    """
    if counts.interface is None:
        if _seen_from_outside(record) is not None:
            yield "the source has a network of its own and told no counts of its interfaces"
        return
    by_streams = counts.relayed or counts.duplicated
    told = counts.dest if not by_streams else counts.dest and counts.dest.get("streams")
    if not told and not record.node_was_killed("dest"):
        of_what = "TCP streams" if by_streams else "interfaces"
        yield f"the destination told no counts of its {of_what}: the two ends cannot be compared"
    unseen = {event.fields["host"]: event.fields for event in record.all("wire_unseen", "testbed")}.get(
        "source"
    )
    if _seen_from_outside(record) is None and not (unseen and unseen.get("elsewhere")):
        reason = f": {unseen['reason']}" if unseen else ""
        yield f"nobody outside counted at the source's interfaces{reason}"


def _seen_from_outside(record: RunRecord) -> Mapping[str, Any] | None:
    """What crossed the source's interfaces in the last attempt."""
    seen = record.last("wire_seen", "testbed")
    if seen is None or seen.at_ns < record.attempt_begins_ns:
        return None
    counted: Mapping[str, Any] | None = seen.fields.get("hosts", {}).get("source")
    return counted
