"""The sideband's words: what is encoded decodes to the same, and nothing malformed gets through."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio import sideband
from virtio.errors import LocalVirtioError, SidebandError

DEVICE = {
    "features": 1 << 32,
    "num_pages": 0,
    "actual": 0,
    "poison_value": 0,
    "ring_bases": [0, 1, 2, 3, 65535],
}
REQUESTS = {
    **{
        op: {}
        for op in (
            "hello",
            "ram",
            "pause",
            "save",
            "discard",
            "frames",
            "check",
            "freeze",
            "standby",
            "shutdown",
        )
    },
    "resume": {"guest_epoch": 3},
    "throttle": {"percent": 50},
    "reload_balloon": {"options": {"hints": "walk"}},
    "restore": {"guest_epoch": 4, "state": "QUJD", "device": DEVICE},
    "run": {"guest_epoch": 4},
}


def test_every_operation_of_the_contract_is_there():
    assert REQUESTS.keys() == sideband.REQUESTS.keys()


@pytest.mark.parametrize(("op", "fields"), REQUESTS.items(), ids=REQUESTS)
def test_requests_decode_to_what_was_encoded(op: str, fields: dict[str, object]):
    assert sideband.decode(sideband.encode(op, id=7, **fields)) == (op, {"id": 7, **fields})
    for name in ("id", *fields):
        with pytest.raises(LocalVirtioError):
            sideband.encode(op, **({"id": 7, **fields} | {name: None}))
        message = {"op": op, "id": 7, **fields}
        del message[name]
        with pytest.raises(SidebandError) as caught:
            sideband.decode(json.dumps(message).encode())
        assert caught.value.kind == "field"


def test_replies_have_the_requests_id_and_no_operation():
    data = sideband.encode_reply(7, state="QUJD")
    assert json.loads(data) == {"id": 7, "ok": True, "state": "QUJD"}
    assert sideband.decode(data) == (sideband.REPLY, {"id": 7, "ok": True, "state": "QUJD"})
    refused = sideband.encode_error(7, "no " * 1000)
    op, fields = sideband.decode(refused)
    assert (op, fields["ok"], len(fields["error"])) == (sideband.REPLY, False, 1000)


def test_notifications_have_an_event_and_no_id():
    data = sideband.encode(sideband.NOTIFY, event="oom", pages=3)
    assert sideband.decode(data) == (sideband.NOTIFY, {"event": "oom", "pages": 3})
    with pytest.raises(LocalVirtioError):
        sideband.encode(sideband.NOTIFY, event="party")


@pytest.mark.parametrize(
    ("op", "fields", "good"),
    [
        ("save", {"state": "QUJD"}, True),
        ("save", {"state": 3}, False),
        ("save", {"state": "x" * 30_000}, False),
        ("pause", {"paused_at_ns": 1, "ring_bases": [0] * 5}, True),
        ("pause", {"paused_at_ns": 1, "ring_bases": [0] * 4}, False),
        ("pause", {"paused_at_ns": True, "ring_bases": [0] * 5}, False),
        ("pause", {"paused_at_ns": -1, "ring_bases": [0] * 5}, False),
        ("check", {"ok_items": 1, "problems": ["kv: item 3"]}, True),
        ("check", {"ok_items": 1, "problems": ["x"] * 101}, False),
        ("discard", {}, True),
    ],
)
def test_replies_are_checked_by_their_operation(op: str, fields: dict[str, object], good: bool):
    if good:
        assert sideband.check_reply(op, fields) == fields
    else:
        with pytest.raises(SidebandError):
            sideband.check_reply(op, fields)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "json"),
        (b"\xff", "json"),
        (b"[]", "json"),
        (b"[" * 60_000, "json"),
        (b'{"op": "hello", "id": 1' + b"0" * 5000 + b"}", "json"),
        (b"{}", "op"),
        (b'{"op": 3}', "op"),
        (b'{"op": "format_disk", "id": 1}', "op"),
        (b'{"op": "hello"}', "field"),
        (b'{"op": "hello", "id": "1"}', "field"),
        (b'{"op": "hello", "id": true}', "field"),
        (b'{"op": "throttle", "id": 1, "percent": 100}', "field"),
        (b'{"ok": true}', "field"),
        (b'{"ok": false, "id": 1}', "field"),
        (b'{"op": "notify", "event": "party"}', "field"),
        (b" " * (64 * 1024 + 1), "size"),
    ],
)
def test_malformed_datagrams_are_refused(data: bytes, kind: str):
    with pytest.raises(SidebandError) as caught:
        sideband.decode(data)
    assert caught.value.kind == kind


def test_our_own_messages_stay_below_64_kib_and_are_json():
    with pytest.raises(LocalVirtioError):
        sideband.encode("hello", id=1, padding="x" * 65_536)
    with pytest.raises(LocalVirtioError):
        sideband.encode("hello", id=1, extra=float("nan"))
    with pytest.raises(LocalVirtioError):
        sideband.encode("hello", id=1, extra=object())


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(data: bytes):
    with pytest.raises(SidebandError):
        sideband.decode(data)


# Four leaves: five small numbers would be the bases of five rings, which are right.
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4))
def test_random_device_states_are_checked(value: object):
    message = {
        "op": "restore",
        "id": 1,
        "guest_epoch": 1,
        "state": "",
        "device": {**DEVICE, "ring_bases": value},
    }
    with pytest.raises(SidebandError):
        sideband.decode(json.dumps(message).encode())
