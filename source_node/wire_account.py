"""Bytes at the source, counted in three places: page payload, gRPC messages, and the wire.

Rule 1: the wire is the interfaces of this host's own network namespace where it has one, and the kernel's account
        of the very connections (TCP_INFO) where the peer is reached by the loopback or by a shared network.
Rule 2: counting begins before the first byte of the attempt and is sampled at round ends; what an interface or a
        connection counted until it went is kept (host/interfaces.py, host/wire.py).
Rule 3: nothing is reconciled here: the framing model is the judge's (testbed/analysis/framing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from host.interfaces import InterfaceCount, InterfaceMeter, mtu_bytes, segmentation_offload
from host.wire import OtherTraffic, TcpMeter, WireCount

if TYPE_CHECKING:
    from migration.ledger import MigrationLedger
    from source_node.destination import Destination
    from source_node.page_stream import PageStream


@dataclass(frozen=True, slots=True)
class WireSample:
    """All counters at one instant; the interfaces' are None where the connections stand for the wire."""

    tcp: WireCount
    interface: InterfaceCount | None = None
    others: WireCount | None = None

    @property
    def tx_bytes(self) -> int:
        """On the wire, towards the destination."""
        return self.tcp.tx_bytes if self.interface is None else self.interface.tx_bytes

    @property
    def rx_bytes(self) -> int:
        """On the wire, from the destination."""
        return self.tcp.rx_bytes if self.interface is None else self.interface.rx_bytes


class _Meters:
    """The meters of an attempt, made before its first connection."""

    def __init__(self, address: str) -> None:
        self._tcp = TcpMeter(address)
        self._interfaces = InterfaceMeter.towards(address)
        self._others = OtherTraffic(address) if self._interfaces is not None else None

    def round_trip_ms(self) -> float:
        self._tcp.sample()
        return self._tcp.round_trip_ms

    def sample(self) -> WireSample:
        interfaces, others = self._interfaces, self._others
        return WireSample(
            self._tcp.sample(),
            interfaces.sample() if interfaces is not None else None,
            others.sample() if others is not None else None,
        )


class WireAccount:
    """Samples the counters at round ends and in total."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._meters: _Meters | None = None
        self._last = WireSample(WireCount(0, 0, 0, 0))
        self._grpc_bytes = 0
        self.payload_bytes = 0  # of finished rounds

    def start(self) -> None:
        """From now on what crosses the wire belongs to this attempt; before its connection is opened."""
        if self._meters is None:
            self._meters = _Meters(self._address)

    def round_ended(
        self, ledger: MigrationLedger, stream: PageStream, destination: Destination
    ) -> dict[str, object]:
        """Bytes and packets since the previous round's end."""
        wire, last = self._sample(), self._last
        grpc_bytes = stream.grpc_bytes + destination.control_bytes
        fields: dict[str, object] = {
            "grpc_bytes": grpc_bytes - self._grpc_bytes,
            "wire_bytes": wire.tx_bytes - last.tx_bytes,
            "wire_rx_bytes": wire.rx_bytes - last.rx_bytes,
            "retransmitted_bytes": wire.tcp.retransmitted_bytes - last.tcp.retransmitted_bytes,
        }
        if wire.interface is not None:
            since = wire.interface - (last.interface or InterfaceCount())
            fields |= {"wire_packets": since.tx_packets, "wire_rx_packets": since.rx_packets}
        self._last, self._grpc_bytes = wire, grpc_bytes
        self.payload_bytes = ledger.payload_bytes
        return fields

    def round_trip_ms(self) -> float:
        """The shortest to the destination so far, as the kernel measured it; 0 when it measured none."""
        return self._meters.round_trip_ms() if self._meters is not None else 0.0

    def calibrate(self, stream: PageStream) -> None:
        """Tell a limited stream what its bytes are on the wire; reading the counters takes a millisecond."""
        if stream.limited:
            stream.measured(self._sample().tx_bytes)

    def totals(
        self, ledger: MigrationLedger, stream: PageStream | None, destination: Destination | None
    ) -> dict[str, object]:
        """The `bytes` of the result document, with what the framing model needs."""
        wire = self._sample()
        control = destination.control_bytes if destination is not None else 0
        fields: dict[str, object] = {
            "payload": ledger.payload_bytes,
            "encoded": ledger.payload_bytes - (stream.saved_bytes if stream is not None else 0),
            "grpc": (stream.grpc_bytes if stream is not None else 0) + control,
            "control": control,
            "wire_tx": wire.tx_bytes,
            "wire_rx": wire.rx_bytes,
            "wire_source": "tcp_info" if wire.interface is None else "interface",
            "retransmitted": wire.tcp.retransmitted_bytes,
            "messages": stream.messages if stream is not None else 0,
            "resent_pages": stream.resent_pages if stream is not None else 0,
            "tls": destination is not None and destination.encrypted,
            "tcp": wire.tcp.fields(),
        }
        if wire.interface is not None:
            fields["interface"] = {
                **wire.interface.fields(),
                "offload": segmentation_offload(),
                "mtu_bytes": mtu_bytes(),
            }
        if wire.others is not None:
            fields["others"] = wire.others.fields()
        return fields

    def _sample(self) -> WireSample:
        return self._meters.sample() if self._meters is not None else self._last
