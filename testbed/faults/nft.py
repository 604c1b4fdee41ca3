"""Rules of a host's own nftables, in a table of their own for each fault.

Rule 1: a fault's rules live in one table named after it; healing is deleting that table, and deleting one that is
        gone is no error.
Rule 2: rules look at packets that come in from the other hosts, by address: a packet is harmed where it arrives, so
        that its sender learns of it only as a sender would; and the testbed's own channel is never touched.
Rule 3: which packets are chosen is decided in the kernel by a seeded table over their number (numgen inc): the same
        seed chooses the same packets, in bursts or alone.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Final

from testbed.faults.errors import FaultError
from testbed.faults.namespace import in_namespace, namespace_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CYCLE: Final = 1 << 16  # packets after which the same choice begins again
NFT_S: Final = 20.0  # a transaction takes milliseconds
PRIORITY: Final = -10  # before ordinary filters, after connection tracking and address translation
NETLINK_NETFILTER: Final = 12
NFTABLES: Final = 10
BATCH_BEGIN, BATCH_END, NEW_RULE = 16, 17, NFTABLES << 8 | 6
NLM_F_REQUEST, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE = 1, 4, 0x800, 0x400
NLMSG_ERROR: Final = 2
NESTED: Final = 0x8000
QUEUE_BYPASS: Final = 1


def load(pid: int, rules: str) -> None:
    """Loads rules, all or none, into the namespace of `pid`. Raises FaultError with nft's reason."""
    nft(pid, "-f", "-", given=rules)


def nft(pid: int, *arguments: str, given: str = "") -> str:
    """What nft says there."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nft", *arguments], input=given, capture_output=True, text=True, timeout=NFT_S, check=False
        )

    try:
        done = in_namespace(namespace_of(pid), run)
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"nft did not answer within {NFT_S:g} s") from error
    if done.returncode:
        raise FaultError(f"nft: {(done.stderr.strip().splitlines() or ['no reason given'])[0]}")
    return done.stdout


def table(name: str, body: str) -> str:
    """A table of its own, empty at first."""
    return f"table inet {name} {{\n{body}\n}}\n"


def incoming(rules: Iterable[str]) -> str:
    """A chain that looks at what comes in."""
    lines = "\n".join(f"  {rule}" for rule in rules)
    return f" chain incoming {{\n  type filter hook input priority {PRIORITY};\n{lines}\n }}"


def from_hosts(addresses: Sequence[str]) -> str:
    """Matches what other hosts sent."""
    return f"ip saddr {{ {', '.join(addresses)} }}"


def choose(numbers: Iterable[int], chain: str) -> str:
    """Sends the packets with these numbers (of CYCLE, ascending) to `chain`."""
    elements = ", ".join(
        f"{first}-{last} : goto {chain}" if last > first else f"{first} : goto {chain}"
        for first, last in runs_of(numbers)
    )
    return f"numgen inc mod {CYCLE} vmap {{ {elements} }}"


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """(first, last) of every run in ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def delete_table(pid: int, name: str) -> None:
    """Deletes a table; one that is not there is made first, so that nothing can be missing."""
    load(pid, f"table inet {name} {{}}\ndelete table inet {name}\n")


def has_table(pid: int, name: str) -> bool:
    """Whether the table is there."""
    listed = json.loads(nft(pid, "-j", "list", "tables"))["nftables"]
    return any(entry.get("table", {}).get("name") == name for entry in listed)


def counted_packets(pid: int, name: str) -> int:
    """Packets that the table's counters have seen together."""
    listed = json.loads(nft(pid, "-j", "list", "table", "inet", name))["nftables"]
    expressions = (part for entry in listed if "rule" in entry for part in entry["rule"]["expr"])
    return sum(int(part["counter"]["packets"]) for part in expressions if "counter" in part)


def queue_chain(pid: int, name: str, chain: str, queue: int) -> None:
    """Appends to a chain that its packets go to a queue, or on when nobody holds that.

    nft has a word for it (`queue`), and not every kernel that has queues has it; xt_NFQUEUE through nft_compat is
    where iptables is, so the rule is made by that expression, as iptables-nft makes it.
    """
    target = _nested(2, _attribute(1, b"NFQUEUE\0") + _attribute(2, struct.pack(">I", 3))
                     + _attribute(3, struct.pack("=HHHxx", queue, 1, QUEUE_BYPASS)))  # fmt: skip
    expression = _nested(1, _attribute(1, b"target\0") + target)
    body = struct.pack(">BBH", 1, 0, 0) + _attribute(1, name.encode() + b"\0")
    body += _attribute(2, chain.encode() + b"\0") + _nested(4, expression)
    batch = struct.pack(">BBH", 0, 0, NFTABLES)
    rule_flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND
    request = (
        _message(BATCH_BEGIN, NLM_F_REQUEST, batch)
        + _message(NEW_RULE, rule_flags, body)
        + _message(BATCH_END, NLM_F_REQUEST, batch)
    )

    def send() -> bytes:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
            netlink.settimeout(NFT_S)
            netlink.bind((0, 0))
            netlink.send(request)
            return netlink.recv(1 << 16)

    answer = in_namespace(namespace_of(pid), send)
    kind, number = struct.unpack_from("=4xH10xi", answer)
    if kind == NLMSG_ERROR and number:
        raise FaultError(
            f"the kernel takes no rule for packet queues (xt_NFQUEUE, nft_compat): error {-number}"
        )


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def _nested(kind: int, value: bytes) -> bytes:
    return _attribute(kind | NESTED, value)
