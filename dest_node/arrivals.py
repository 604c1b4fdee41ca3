"""What reaches this host by the wire while it takes a guest in: the other end of the source's account.

Rule 1: only a host with a network of its own counts (host/interfaces.py); elsewhere nothing is told.
Rule 2: a round is over here when the chunk without pages is there that the source ends it with; the last such chunk
        of a round, of whatever stream, has the round's figures.
Rule 3: with the last figures goes what the TCP streams carried: a relay between the hosts, such as that of a
        published port, makes packets of its own and sends them again on its own account.
Rule 4: figures are since Open of the attempt, so that the two ends differ by the opening of the connection.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from urllib.parse import unquote

from host.interfaces import InterfaceMeter
from host.wire import ServedTraffic

if TYPE_CHECKING:
    from host.event_log import EventLog
    from migration.identity import AttemptKey


class Arrivals:
    """One per host; counts the newest attempt."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._attempt = ""
        self._meter: InterfaceMeter | None = None
        self._streams: ServedTraffic | None = None

    def opened(self, key: AttemptKey, peer: str) -> None:
        """A new attempt begins to arrive from `peer`, as gRPC names it; a resumed one goes on counting."""
        if self._attempt == str(key):
            return
        self._attempt = str(key)
        family, _, address = unquote(peer).partition(":")
        self._meter = InterfaceMeter.towards(address) if family in ("ipv4", "ipv6") else None
        self._streams = ServedTraffic(address) if self._meter is not None else None

    def round_received(self, index: int) -> None:
        """All that the source sent in this round on one stream is stored."""
        self._tell("round_received", {"round": index})

    def committed(self) -> None:
        """Commit was answered. Not on the caller's thread: what a lost connection carried is waited for."""
        threading.Thread(target=self.answered, args=("commit",), name="arrivals", daemon=True).start()

    def answered(self, step: str) -> None:
        """A control call is about to be answered, or was; the newest of these has the attempt's figures."""
        streams = self._streams.sample().fields() if self._streams is not None else {}
        self._tell("wire_received", {"step": step, "streams": streams})

    def _tell(self, name: str, fields: dict[str, object]) -> None:
        if self._meter is not None:
            counted = self._meter.sample().fields()
            self._events.add(name, attempt=self._attempt, **fields, **counted)
