"""Certificates of a run and the rules of who may talk: names, files, plain text, unix peers. Nothing is started."""

import os
import socket
import stat
from datetime import UTC, datetime, timedelta

import pytest

from guest_agent import peer_credentials as agent_side
from host import peer_credentials as host_side
from host.agent_link import AgentLink
from host.errors import AgentLost
from host.tls import OnlyFrom, Trust, TrustError, is_loopback
from testbed.hosts.certificates import make_run_authority


@pytest.fixture
def authority(tmp_path):
    return make_run_authority("5eed", tmp_path / "tls")


def test_files_are_for_their_holder_alone(authority):
    files = authority.issue("b")
    assert files.server_name == "b.5eed.ballast"
    assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.directory.parent.stat().st_mode) == 0o700
    for path in (files.ca, files.cert, files.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"PRIVATE" not in files.ca.read_bytes() + files.cert.read_bytes()
    with pytest.raises(FileExistsError):
        authority.issue("b")


@pytest.mark.parametrize("name", ["", "a.b", "A", "-", "a" * 64, "a b", "b/../c"])
def test_a_name_that_is_no_label_is_refused(authority, tmp_path, name):
    with pytest.raises(ValueError, match="cannot be part of a server name"):
        authority.issue(name)
    with pytest.raises(ValueError, match="cannot be part of a server name"):
        make_run_authority(name, tmp_path)


def test_a_key_that_others_can_read_is_refused(authority):
    files = authority.issue("b")
    files.key.chmod(0o640)
    with pytest.raises(TrustError, match=r"others can read this key; chmod 600"):
        Trust(files.directory)


@pytest.mark.parametrize("shift", [timedelta(days=-3), timedelta(days=3)], ids=["expired", "not yet"])
def test_a_certificate_that_is_not_valid_now_is_refused_at_the_start(tmp_path, shift):
    files = make_run_authority("5eed", tmp_path / "tls", now=datetime.now(UTC) + shift).issue("b")
    with pytest.raises(TrustError, match="not valid now"):
        Trust(files.directory)


def test_files_that_are_not_there_or_make_no_sense(authority, tmp_path):
    with pytest.raises(TrustError, match=r"ca\.pem: cannot be read: No such file"):
        Trust(tmp_path)
    files = authority.issue("b")
    files.cert.write_bytes(b"no certificate")
    with pytest.raises(TrustError, match=r"cert\.pem: no certificate with a name"):
        Trust(files.directory)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:0", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True), ("unix:/x", True),
        ("0.0.0.0:0", False), ("[::]:0", False), ("198.18.0.1:1", False), ("example:1", False), (":1", False),
    ],
)  # fmt: skip
def test_what_cannot_leave_this_machine(address, loopback):
    assert is_loopback(address) is loopback


def test_plain_text_is_for_loopback_or_asked_for(authority):
    plain, asked = Trust(), Trust(insecure=True)
    assert plain.why_not_call("127.0.0.1:1", "") == ""
    assert "plain text is for loopback only" in plain.why_not_call("198.18.0.1:1", "")
    assert asked.why_not_call("198.18.0.1:1", "") == ""
    assert "start this host with --tls-dir" in plain.why_not_call("127.0.0.1:1", "b.5eed.ballast")
    encrypted = Trust(authority.issue("a").directory)
    assert "must name the destination's certificate" in encrypted.why_not_call("127.0.0.1:1", "")
    assert encrypted.why_not_call("198.18.0.1:1", "b.5eed.ballast") == ""
    with pytest.raises(TrustError, match="start this host"):
        plain.channel("127.0.0.1:1", "b.5eed.ballast", [])


@pytest.mark.parametrize(
    ("names", "host", "control"),
    [
        (["a.5eed.ballast"], True, False),
        (["third.5eed.ballast"], True, False),
        (["control.5eed.ballast"], False, True),
        (["b.5eed.ballast"], False, False),
        (["a.other.ballast"], False, False),
        (["a.5eed.ballast.example"], False, False),
        (["a"], False, False),
        ([], False, False),
    ],
)
def test_a_certificate_opens_one_door(authority, names, host, control):
    """`b` itself is asked: it lets other hosts of its run send pages, and the testbed alone give orders."""
    trust = Trust(authority.issue("b").directory)
    assert (_refusal(trust.hosts_only(), names) == "") is host
    assert (_refusal(trust.control_only("127.0.0.1:0"), names) == "") is control
    assert trust.control_only("unix:/x") == []
    for reason in (_refusal(trust.hosts_only(), names), _refusal(trust.control_only("127.0.0.1:0"), names)):
        assert "\n" not in reason


def _refusal(interceptors, names):
    (only,) = interceptors
    assert isinstance(only, OnlyFrom)
    return only.why_not(names)


@pytest.mark.parametrize("module", [host_side, agent_side], ids=["host", "agent"])
def test_another_users_process_is_not_spoken_with(monkeypatch, module):
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert module.why_not_trusted(ours) == ""
        user = os.geteuid()
        monkeypatch.setattr(module.os, "geteuid", lambda: user + 1)
        reason = module.why_not_trusted(ours)
    assert reason == f"the peer is process {os.getpid()} of user {user}, only user {user + 1} may talk here"


def test_a_socket_that_another_user_put_there_is_no_agent(tmp_path, monkeypatch):
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(4)
        user = os.geteuid()
        monkeypatch.setattr(host_side.os, "geteuid", lambda: user + 1)
        link = AgentLink(path)
        with pytest.raises(AgentLost, match=f"of user {user}, only user {user + 1} may talk here"):
            link.connect(timeout=0.01)
        assert not link.connected
        link.close()
