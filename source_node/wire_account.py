"""Bytes at the source, counted in three places: page payload, gRPC messages, and the very connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.wire import TcpMeter, WireCount

if TYPE_CHECKING:
    from migration.ledger import MigrationLedger
    from source_node.destination import Destination
    from source_node.page_stream import PageStream


class WireAccount:
    """Samples the kernel's counters at round ends and keeps the last sample when a connection goes."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._meter: TcpMeter | None = None
        self._last = WireCount(0, 0, 0, 0)
        self._grpc_bytes = 0
        self.payload_bytes = 0  # of finished rounds

    def start(self) -> None:
        """From now on there is a connection to count."""
        self._meter = TcpMeter(self._address)

    def round_ended(
        self, ledger: MigrationLedger, stream: PageStream, destination: Destination
    ) -> dict[str, object]:
        """grpc_bytes and wire_bytes since the previous round's end."""
        wire, grpc_bytes = self._sample(), stream.grpc_bytes + destination.control_bytes
        fields: dict[str, object] = {
            "grpc_bytes": grpc_bytes - self._grpc_bytes,
            "wire_bytes": wire.tx_bytes - self._last.tx_bytes,
        }
        self._last, self._grpc_bytes = wire, grpc_bytes
        stream.measured(wire.tx_bytes)
        self.payload_bytes = ledger.payload_bytes
        return fields

    def totals(
        self, ledger: MigrationLedger, stream: PageStream | None, destination: Destination | None
    ) -> dict[str, object]:
        """The `bytes` of the result document, with what the framing model needs."""
        wire = self._sample()
        control = destination.control_bytes if destination is not None else 0
        return {
            "payload": ledger.payload_bytes,
            "grpc": (stream.grpc_bytes if stream is not None else 0) + control,
            "wire_tx": wire.tx_bytes,
            "wire_rx": wire.rx_bytes,
            "wire_source": "tcp_info",
            "retransmitted": wire.retransmitted_bytes,
            "messages": stream.messages if stream is not None else 0,
        }

    def _sample(self) -> WireCount:
        return self._meter.sample() if self._meter is not None else self._last
