"""Faults made of rules: a table at every host where harmed packets arrive, and the healer that removes it.

Rule 1: either every table is there, or none.
Rule 2: chosen packets are chosen by the fault's seed and the packet's number, see nft.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from random import Random
from typing import TYPE_CHECKING, Any

from testbed.faults import nft, probing
from testbed.faults.fault import NetworkFault, is_same_network
from testbed.faults.namespace import inode_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.faults.fault import Direction, Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host

TAKEN = "taken"


class RulesFault(NetworkFault):
    """Base of the kinds that are rules alone."""

    @classmethod
    def lacks(cls) -> str:
        """Rules that number packets."""
        return probing.lacks("rules")

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:  # noqa: ARG003
        """Deletes the tables; how many packets they counted."""
        return heal_rules(undo)


def apply_rules(target: Target, direction: Direction, body_of: Callable[[Sequence[str], int], str]) -> Undo:
    """Loads `body_of(addresses of the senders, seed)` at every receiver; what `heal_rules` needs."""
    tables: list[dict[str, Any]] = []
    with ExitStack() as undoing:
        for index, (port, addresses) in enumerate(target.receivers(direction)):
            nft.load(port.pid, nft.table(target.label, body_of(addresses, target.seed + index)))
            undoing.callback(nft.delete_table, port.pid, target.label)
            tables.append({"pid": port.pid, "inode": inode_of(port.pid), "table": target.label})
        undoing.pop_all()
    return {"tables": tables}


def heal_rules(undo: Undo) -> dict[str, Any]:
    """Deletes the tables; how many packets they counted."""
    packets = 0
    for entry in undo["tables"]:
        if is_same_network(entry["pid"], entry["inode"]) and nft.has_table(entry["pid"], entry["table"]):
            packets += nft.counted_packets(entry["pid"], entry["table"])
            nft.delete_table(entry["pid"], entry["table"])
    return {"packets": packets}


def chosen(share: float, seed: int) -> list[int]:
    """Which packets of a cycle, ascending: exactly the share of them, drawn alone."""
    return sorted(Random(seed).sample(range(nft.CYCLE), max(1, round(share * nft.CYCLE))))


def taking(addresses: Sequence[str], numbers: Sequence[int] | None, verdict: str, *, only: str = "") -> str:
    """A table's body: of the senders' packets the chosen ones (None: all) go to a chain that counts and judges.

    `only` is a further match, for packets that are not to be looked at.
    """
    choice = f"goto {TAKEN}" if numbers is None else nft.choose(numbers, TAKEN)
    rule = " ".join(part for part in (nft.from_hosts(addresses), only, choice) if part)
    return f" chain {TAKEN} {{\n  counter {verdict}\n }}\n{nft.incoming([rule])}"
