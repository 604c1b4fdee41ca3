"""The small second socket between a node and its guest agent: what vhost-user has no message for.

Rule 1: one SOCK_SEQPACKET datagram is one JSON object of at most 64 KiB; descriptors travel beside it
        (SCM_RIGHTS).
Rule 2: a request has "op" and "id"; its reply has the same "id" and "ok", and "error" when it is not ok; a
        notification has op "notify" and "event" and no id.
Rule 3: whatever arrives is checked here, once: names, types and ranges. Fields nobody asked for are let
        through, so that an older node and a newer agent can talk.
Rule 4: no sockets here. `FDS_OF_REQUEST` and `FDS_OF_REPLY` say how many descriptors belong to a message.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from virtio.errors import LocalVirtioError, SidebandError

VERSION = 1
MESSAGE_BYTES_MAX = 64 * 1024  # far below the default SO_SNDBUF; larger things travel as memfds
FDS_MAX = (
    4  # the most any message carries is two; a flood of descriptors must not exhaust the receiver's table
)
REPLY = "reply"
NOTIFY = "notify"
EVENTS = frozenset({"ready", "workload_failed", "oom"})
PROBLEMS_MAX = 100  # of one self-check: they go in one datagram

U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1
RINGS = 5


@dataclass(frozen=True, slots=True)
class Number:
    """An integer field (never a bool) within low..high."""

    high: int
    low: int = 0

    def accepts(self, value: object) -> bool:
        """Whether the value is such an integer."""
        return type(value) is int and self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Text:
    """A string field of at most `length` characters."""

    length: int = 4096

    def accepts(self, value: object) -> bool:
        """Whether the value is such a string."""
        return isinstance(value, str) and len(value) <= self.length


@dataclass(frozen=True, slots=True)
class Flag:
    """A boolean field."""

    def accepts(self, value: object) -> bool:
        """Whether the value is true or false."""
        return isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Listing:
    """A list of one kind of item; `exactly` fixes its length."""

    item: Number | Text
    most: int
    exactly: bool = False

    def accepts(self, value: object) -> bool:
        """Whether the value is such a list."""
        if (
            not isinstance(value, list)
            or len(value) > self.most
            or (self.exactly and len(value) != self.most)
        ):
            return False
        return all(self.item.accepts(item) for item in value)


@dataclass(frozen=True, slots=True)
class Table:
    """An object; `fields` must be there, others may be."""

    fields: dict[str, Number | Text | Flag | Listing | Table]

    def accepts(self, value: object) -> bool:
        """Whether the value is an object with at least these fields."""
        return isinstance(value, dict) and all(
            name in value and rule.accepts(value[name]) for name, rule in self.fields.items()
        )


Rule = Number | Text | Flag | Listing | Table

_EPOCH = Number(U64_MAX)
_PAGES = Number(2**40)
_BASES = Listing(Number(0xFFFF), RINGS, exactly=True)
_STATE_TEXT = Text(24 * 1024)  # base64 of at most 16 KiB
_DEVICE = Table(
    {
        "features": Number(U64_MAX),
        "num_pages": Number(U32_MAX),
        "actual": Number(U32_MAX),
        "poison_value": Number(U32_MAX),
        "ring_bases": _BASES,
    }
)

REQUESTS: dict[str, dict[str, Rule]] = {
    "hello": {},
    "ram": {},
    "pause": {},
    "resume": {"guest_epoch": _EPOCH},
    "reload_balloon": {"options": Table({})},
    "throttle": {"percent": Number(99)},
    "save": {},
    "restore": {"guest_epoch": _EPOCH, "state": _STATE_TEXT, "device": _DEVICE},
    "run": {"guest_epoch": _EPOCH},
    "discard": {},
    "frames": {},
    "check": {},
    "freeze": {},
    "standby": {},
    "shutdown": {},
}
REPLIES: dict[str, dict[str, Rule]] = {
    "hello": {
        "version": Number(U32_MAX),
        "kind": Text(64),
        "state": Text(64),
        "guest_epoch": _EPOCH,
        "pages": _PAGES,
        "free_pages": _PAGES,
        "ballooned_pages": _PAGES,
        "held_pages": _PAGES,
        "balloon_ready": Flag(),
        "operations": Number(U64_MAX),
        "workloads": Table({}),
        "pid": Number(2**31 - 1, low=1),
        "ready": Flag(),
    },
    "ram": {"base_address": Number(U64_MAX), "memory_bytes": Number(2**52), "write_protect": Text()},
    "pause": {"paused_at_ns": Number(U64_MAX), "ring_bases": _BASES},
    "reload_balloon": {"features": Number(U64_MAX)},
    "save": {"state": _STATE_TEXT},
    "restore": {"image_pages": _PAGES, "digest_hex": Text(16)},
    "run": {"started_at_ns": Number(U64_MAX)},
    "check": {"ok_items": Number(U64_MAX), "problems": Listing(Text(), PROBLEMS_MAX)},
}
# (fewest, most) descriptors beside a message; everything else carries none.
FDS_OF_REQUEST: dict[str, tuple[int, int]] = {"restore": (1, 1), "check": (1, 1)}
FDS_OF_REPLY: dict[str, tuple[int, int]] = {"ram": (1, 2), "frames": (1, 1)}


def encode(op: str, **fields: Any) -> bytes:
    """One datagram.

    `op` is the name of a request, `REPLY` or `NOTIFY`. A request needs `id`; a reply `id` and `ok`.

    Raises:
        LocalVirtioError: our own message would not pass `decode`, or is larger than 64 KiB.
    """
    message = dict(fields) if op == REPLY else {"op": op, **fields}
    try:
        _check(op, fields)
        data = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    except SidebandError as error:
        raise LocalVirtioError(f"sideband message {op!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise LocalVirtioError(f"sideband message {op!r} is not JSON: {error}") from error
    if len(data) > MESSAGE_BYTES_MAX:
        raise LocalVirtioError(f"sideband message {op!r} has {len(data)} bytes, at most {MESSAGE_BYTES_MAX}")
    return data


def encode_reply(request_id: int, **fields: Any) -> bytes:
    """The datagram that answers a request well. Raises as `encode`."""
    return encode(REPLY, id=request_id, ok=True, **fields)


def encode_error(request_id: int, error: str) -> bytes:
    """The datagram that refuses a request, with a reason of at most 1000 characters. Raises as `encode`."""
    return encode(REPLY, id=request_id, ok=False, error=error[:1000])


def decode(data: bytes | bytearray | memoryview) -> tuple[str, dict[str, Any]]:
    """What a datagram says: (op, fields without "op"); op is `REPLY` or `NOTIFY` for what is no request.

    Raises:
        SidebandError: kind "size", "json", "op" or "field".
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise SidebandError("size", f"{len(data)} bytes, at most {MESSAGE_BYTES_MAX}")
    try:
        message = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:  # bad UTF-8 and absurd numbers are ValueErrors as well
        raise SidebandError("json", str(error)[:200]) from error
    if not isinstance(message, dict):
        raise SidebandError("json", "not an object")
    op = message.pop("op", REPLY if "ok" in message else None)
    if not isinstance(op, str):
        raise SidebandError("op", "neither a request nor a reply")
    _check(op, message)
    return op, message


def check_reply(op: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a good reply to request `op`, checked. Raises SidebandError ("field")."""
    _check_fields(REPLIES.get(op, {}), fields)
    return fields


def _check(op: str, fields: dict[str, Any]) -> None:
    if op == NOTIFY:
        _check_fields({"event": Text(64)}, fields)
        if fields["event"] not in EVENTS:
            raise SidebandError("field", f"unknown event {fields['event']!r}")
        return
    if op == REPLY:
        _check_fields({"id": Number(U64_MAX), "ok": Flag()}, fields)
        if not fields["ok"]:
            _check_fields({"error": Text()}, fields)
        return
    if op not in REQUESTS:
        raise SidebandError("op", f"unknown operation {op[:64]!r}")
    _check_fields({"id": Number(U64_MAX), **REQUESTS[op]}, fields)


def _check_fields(rules: dict[str, Rule], fields: dict[str, Any]) -> None:
    for name, rule in rules.items():
        if name not in fields:
            raise SidebandError("field", f"{name!r} is missing")
        if not rule.accepts(fields[name]):
            raise SidebandError("field", f"{name!r} is not {rule}: {fields[name]!r}"[:300])
