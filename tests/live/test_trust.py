"""Who may talk to a node over TCP, tried on real processes: a stranger is refused in one line and harms nobody."""

import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from host.tls import Trust
from migration.pb import migration_pb2, migration_pb2_grpc, node_pb2, node_pb2_grpc
from testbed.hosts.certificates import make_run_authority
from tests.live.liars import LIES, grpc_liar
from tests.live.runs import WAIT_S, Bed, is_one_line, log_of, scenario, waited_for

pytestmark = pytest.mark.live

NOBODY = 65534


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Two hosts that speak TLS. Whatever strangers try, the guest leaves whole in the end."""
    with Bed(tmp_path_factory.mktemp("guarded"), scenario("hosts.tls=true")) as bed:
        yield bed
        bed.guest_is_back()
        ended = bed.migrate()
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        bed.wait("guest_running", "dest")
        bed.check(bed.dest)
        for name in ("source-node", "dest-node"):
            assert "PRIVATE KEY" not in log_of(bed, name)
    kept = [path for path in bed.run_dir.path.rglob("*") if path.is_file()]
    assert not [path for path in kept if b"PRIVATE KEY" in path.read_bytes()]


@pytest.fixture(scope="module")
def strangers(guarded, tmp_path_factory):
    """(credentials, what they lack) by name."""
    home, own = tmp_path_factory.mktemp("strangers"), guarded.hosts.authority
    other = make_run_authority("0ther", home / "other").issue("a")
    expired = own.issue("late", now=datetime.now(UTC) - timedelta(days=3))
    control, ca = own.issue_control(), own.issue("c").ca.read_bytes()

    def with_(files):
        return grpc.ssl_channel_credentials(ca, files.key.read_bytes(), files.cert.read_bytes())

    return {
        "no certificate": grpc.ssl_channel_credentials(ca),
        "another run's certificate": with_(other),
        "an expired certificate": with_(expired),
        "the testbed's certificate": with_(control),
        "plain text": None,
    }


STRANGERS = (
    "no certificate",
    "another run's certificate",
    "an expired certificate",
    "the testbed's certificate",
    "plain text",
)


@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_cannot_send_a_guest(guarded, strangers, who):
    """A testbed certificate, stolen, does not open this door either."""
    code, reason = open_attempt(guarded.hosts.dest, strangers[who])
    if who == "the testbed's certificate":
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "is no other host of this run" in reason
    else:
        assert code is grpc.StatusCode.UNAVAILABLE
    assert is_one_line(reason)


def open_attempt(host, credentials):
    """How the destination answers a caller with these credentials; None: plain text."""
    named = [("grpc.ssl_target_name_override", host.server_name)]
    channel = (
        grpc.insecure_channel(host.migration_address)
        if credentials is None
        else grpc.secure_channel(host.migration_address, credentials, options=named)
    )
    identity = migration_pb2.AttemptId(migration="stranger", attempt=1, guest_epoch=1)
    request = migration_pb2.OpenRequest(id=identity, memory_bytes=64 << 20, page_bytes=4096, integrity="full")
    with channel, pytest.raises(grpc.RpcError) as caught:
        migration_pb2_grpc.MigrationStub(channel).Open(request, timeout=WAIT_S)
    return caught.value.code(), caught.value.details()


def test_tls_is_1_3_and_nothing_older(guarded):
    files = guarded.hosts.authority.issue("d")
    host, _, port = guarded.hosts.dest.migration_address.rpartition(":")

    def shake_hands(version):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(files.ca)
        context.load_cert_chain(files.cert, files.key)
        context.set_alpn_protocols(["h2"])
        context.minimum_version = context.maximum_version = version
        with (
            socket.create_connection((host, int(port)), timeout=WAIT_S) as plain,
            context.wrap_socket(plain, server_hostname=guarded.hosts.dest.server_name) as encrypted,
        ):
            return encrypted.version(), len(encrypted.recv(1))

    assert shake_hands(ssl.TLSVersion.TLSv1_3) == ("TLSv1.3", 1)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake_hands(ssl.TLSVersion.TLSv1_2)


def test_a_source_sends_to_the_name_that_it_was_told_and_to_nobody_else(guarded):
    ended = guarded.migrate(dest_server_name="c.5eed.ballast", link_timeout_ms=600_000)
    assert ended.fields["outcome"] == "failed"
    assert is_one_line(ended.fields["reason"])
    guarded.guest_is_back()


def test_a_source_does_not_fall_back_to_plain_text(guarded):
    with pytest.raises(Exception, match="must name the destination's certificate"):
        guarded.migrate(dest_server_name="")
    with grpc_liar(LIES[next(iter(LIES))]) as address:
        ended = guarded.migrate(dest_address=address)
    assert ended.fields["outcome"] == "failed"
    assert is_one_line(ended.fields["reason"])
    guarded.guest_is_back()


# -- the control port, and a node by itself ---------------------------------------------------------


@contextmanager
def node(home, *options):
    """A node without a guest, and its node.json once it serves or ends."""
    words = [sys.executable, "-m", "host", "--name", "b", "--role", "dest", "--run-dir", home, *options]
    words += ["--vhost-socket", home / "v.sock", "--agent-socket", home / "g.sock", "--journal", home / "j"]
    with (home / "log").open("ab") as log:
        process = subprocess.Popen(words, stderr=log)
    try:
        waited_for(lambda: (home / "node.json").exists() or process.poll() is not None, "the node to serve")
        yield process
    finally:
        process.terminate()
        process.wait(WAIT_S)


def test_the_control_port_wants_the_testbeds_certificate(tmp_path):
    authority = make_run_authority("5eed", tmp_path / "tls")
    files, control = authority.issue("b"), Trust(authority.issue_control().directory)
    with node(tmp_path, "--control", "127.0.0.1:0", "--tls-dir", files.directory):
        address = json.loads((tmp_path / "node.json").read_text())["control"]

        def describe(channel):
            with channel:
                return node_pb2_grpc.NodeStub(channel).Describe(node_pb2.DescribeRequest(), timeout=WAIT_S)

        assert describe(control.channel(address, files.server_name, [])).name == "b"
        another_host = Trust(authority.issue("a").directory)
        with pytest.raises(grpc.RpcError, match=r"only control\.5eed\.ballast may") as caught:
            describe(another_host.channel(address, files.server_name, []))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError):
            describe(grpc.insecure_channel(address))
        with pytest.raises(grpc.RpcError):
            describe(control.channel(address, "a.5eed.ballast", []))


def test_plain_text_beyond_loopback_is_refused_unless_asked_for_and_then_said(tmp_path):
    everywhere = ("--migration-address", "0.0.0.0:0", "--control", f"unix:{tmp_path}/c.sock")
    with node(tmp_path, *everywhere) as process:
        assert process.wait(WAIT_S) == 1
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert "plain text is for loopback only" in last["reason"]
    with (
        node(tmp_path, *everywhere, "--insecure"),
        grpc.insecure_channel(f"unix:{tmp_path}/c.sock") as channel,
    ):
        events = node_pb2_grpc.NodeStub(channel).Watch(node_pb2.WatchRequest(), timeout=WAIT_S)
        told = next(event for event in events if event.name == "plain_text")
        events.cancel()
    assert json.loads(told.fields_json)["loopback"] is False


@pytest.mark.skipif(os.geteuid() != 0, reason="be root: nobody else can play another user")
def test_another_users_process_is_turned_away_at_the_devices_socket(tmp_path):
    """Even if somebody opened the directory and the socket to all."""
    with node(tmp_path, "--control", f"unix:{tmp_path}/c.sock"):
        for path in (tmp_path, *tmp_path.parents[:3]):  # three where tests run side by side
            if not path.samefile(tempfile.gettempdir()):
                path.chmod(path.stat().st_mode | 0o011)
        (tmp_path / "v.sock").chmod(0o666)
        code = (
            "import os, socket, sys; os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); "
            "s.settimeout(20); s.connect(sys.argv[1]); sys.exit(0 if s.recv(1) == b'' else 1)"
        )
        words = [sys.executable, "-c", code, tmp_path / "v.sock", str(NOBODY)]
        assert subprocess.run(words, check=False).returncode == 0
