"""The hosts' interface counters as they look from outside: a second witness beside the nodes' own.

Rule 1: a host with a network of its own is read through /proc/PID/net of one of its processes; nothing is asked of
        the host, so that what a node says of its bytes can be held against what nobody could have made up.
Rule 2: a migration is measured from the request until its end was told; an interface that went in between took
        counts with it that only the node heard of, and is told as such.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.errors import RunBrokenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.history import Event, History
    from testbed.host_handles import Hosts

LOOPBACK: Final = "lo"
INNER_PREFIXES: Final = ("ifb", "dummy")  # what crosses them crosses a real interface, too
COLUMNS: Final = {"rx_bytes": 0, "rx_packets": 1, "tx_bytes": 8, "tx_packets": 9}
TCP_COUNTERS: Final = {"OutSegs": "tcp_segments_sent", "RetransSegs": "tcp_segments_sent_again"}


@dataclass(frozen=True, slots=True)
class NetworkCounts:
    """One look at a network namespace."""

    interfaces: dict[str, dict[str, int]]
    tcp: dict[str, int]

    def since(self, before: NetworkCounts) -> dict[str, int]:
        """What crossed since `before`, all interfaces together; `interfaces_gone` took counts with them."""
        total = dict.fromkeys(COLUMNS, 0)
        for name, now in self.interfaces.items():
            then = before.interfaces.get(name, {})
            begun_anew = any(now[column] < then.get(column, 0) for column in COLUMNS)
            for column in COLUMNS:
                total[column] += now[column] - (0 if begun_anew else then.get(column, 0))
        gone = before.interfaces.keys() - self.interfaces.keys()
        tcp = {name: count - before.tcp.get(name, 0) for name, count in self.tcp.items()}
        return {**total, **tcp, "interfaces_gone": len(gone)}


def look(pid: int) -> NetworkCounts:
    """The network namespace of a process of this machine. Raises RunBrokenError when it is gone."""
    place = Path(f"/proc/{pid}/net")
    try:
        devices = (place / "dev").read_text(encoding="ascii")
        snmp = (place / "snmp").read_text(encoding="ascii")
    except OSError as error:
        raise RunBrokenError(f"the network of process {pid} cannot be read: {error.strerror}") from error
    return NetworkCounts(_interfaces(devices), _tcp(snmp))


@contextmanager
def outside_witness(hosts: Hosts, history: History) -> Iterator[None]:
    """While entered, every migration's end is followed by the event `wire_seen`, per host with a network."""
    before: dict[str, NetworkCounts] = {}

    def watch(event: Event) -> None:
        if event.origin == "testbed" and event.name == "migration_requested":
            before.clear()
            before.update(_look_at_all(hosts, history))
        elif event.name == "migration_ended" and before:
            now = _look_at_all(hosts, history)
            seen = {
                origin: counts.since(before[origin]) for origin, counts in now.items() if origin in before
            }
            history.note("wire_seen", by=event.origin, hosts=seen)

    history.subscribe(watch)
    try:
        yield
    finally:
        history.unsubscribe(watch)


def _look_at_all(hosts: Hosts, history: History) -> dict[str, NetworkCounts]:
    found: dict[str, NetworkCounts] = {}
    for origin, host in hosts.hosts.items():
        if host.network_pid is None:
            if host.container is not None and host.container.elsewhere:
                reason = "it is on another machine"
                history.note("wire_unseen", host=origin, reason=reason, elsewhere=True)
        else:
            try:
                found[origin] = look(host.network_pid)
            except RunBrokenError as error:  # a host that a fault killed: its counters died with it
                history.note("wire_unseen", host=origin, reason=str(error))
    return found


def _interfaces(text: str) -> dict[str, dict[str, int]]:
    found = {}
    for line in text.splitlines():
        name, colon, figures = line.partition(":")
        name = name.strip()
        if colon and name != LOOPBACK and not name.startswith(INNER_PREFIXES):
            columns = figures.split()
            found[name] = {column: int(columns[at]) for column, at in COLUMNS.items()}
    return found


def _tcp(text: str) -> dict[str, int]:
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Tcp:"))
    told = dict(zip(names, values, strict=True))
    return {ours: int(told[theirs]) for theirs, ours in TCP_COUNTERS.items()}
