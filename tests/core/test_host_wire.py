"""The wire meter counts the connections to one peer, all of them, and only those of this process."""

import contextlib
import gc
import socket
import threading
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from host.netlink_news import NetlinkNews
from host.wire import OtherTraffic, ServedTraffic, TcpMeter
from tests.live.runs import waited_for


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address_of(listening):
    return "{}:{}".format(*listening.getsockname())


def exchange(listening, sent, answered, connection=None):
    """Send over a (new) connection, have all of it answered; returns the connection's two ends."""
    ours, theirs = connection or (
        socket.create_connection(listening.getsockname()),
        listening.accept()[0],
    )
    sender = threading.Thread(target=ours.sendall, args=(bytes(sent),))
    sender.start()
    left = sent
    while left:
        left -= len(theirs.recv(min(left, 1 << 20)))
    sender.join()
    theirs.sendall(bytes(answered))
    left = answered
    while left:
        left -= len(ours.recv(left))
    return ours, theirs


def close(connection):
    for end in connection:
        end.close()


def test_it_counts_both_directions_exactly(server):
    meter = TcpMeter(address_of(server))
    assert meter.sample().connections == 0
    connection = exchange(server, 3_000_000, 1234)
    count = meter.sample()
    assert count.tx_bytes - count.retransmitted_bytes == 3_000_000
    assert count.rx_bytes == 1234
    assert count.connections == 1
    exchange(server, 5, 6, connection)
    count = meter.sample()
    assert (count.tx_bytes - count.retransmitted_bytes, count.rx_bytes) == (3_000_005, 1240)
    close(connection)


def test_closed_connections_keep_their_last_value(server):
    meter = TcpMeter(address_of(server))
    first = exchange(server, 1000, 10)
    assert meter.sample().tx_bytes == 1000
    close(first)
    second = exchange(server, 500, 5)
    count = meter.sample()
    assert count.tx_bytes == 1500
    assert count.rx_bytes in (15, 16), "the kernel counts the first one's FIN as a byte"
    close(second)
    assert meter.sample().tx_bytes == 1500


def test_what_a_connection_carried_after_the_last_look_is_heard_when_it_ends(server):
    """A connection that a fault tears in mid-round: nobody looked since its last megabyte."""
    meter = TcpMeter(address_of(server))
    connection = exchange(server, 1000, 10)
    assert meter.sample().tx_bytes == 1000
    exchange(server, 2_000_000, 10, connection)
    close(connection)
    count = meter.sample()
    assert (count.tx_bytes - count.retransmitted_bytes, count.connections, count.unheard) == (2_001_000, 0, 0)


def test_a_connection_that_nobody_saw_alive_is_heard_too(server):
    """Its end is announced by a worker of the kernel, a moment after it."""
    meter = TcpMeter(address_of(server))
    close(exchange(server, 500, 5))
    waited_for(lambda: meter.sample().tx_bytes, "the end of a connection that nobody expects")
    assert meter.sample().tx_bytes == 500


def test_what_was_carried_before_the_meter_was_made_does_not_count(server):
    connection = exchange(server, 1000, 10)
    meter = TcpMeter(address_of(server))
    exchange(server, 70, 7, connection)
    count = meter.sample()
    assert (count.tx_bytes, count.rx_bytes) == (70, 7)
    close(connection)


def test_a_connection_whose_end_is_not_heard_is_told(server, monkeypatch):
    meter = TcpMeter(address_of(server))
    connection = exchange(server, 1000, 10)
    assert meter.sample().unheard == 0
    monkeypatch.setattr(NetlinkNews, "take", lambda _: iter(()))
    close(connection)
    count = meter.sample()
    assert (count.tx_bytes, count.unheard) == (1000, 1)


def test_other_traffic_is_what_leaves_by_the_network_and_not_to_the_peer(server):
    others = OtherTraffic(address_of(server))
    connection = exchange(server, 1000, 10)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        second = exchange(elsewhere, 500, 5)
        assert others.sample().tx_bytes == 0, "loopback never reaches an interface that counts"
        close(second)
    close(connection)


def test_a_server_counts_all_connections_of_a_peer_to_the_port_that_it_reached(server):
    first = exchange(server, 1000, 10)
    meter = ServedTraffic("{}:{}".format(*first[0].getsockname()))
    assert meter.sample().rx_bytes == 0, "what it carried before"
    exchange(server, 3000, 30, first)
    second = exchange(server, 500, 5)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        third = exchange(elsewhere, 70_000, 70)
        count = meter.sample()
        close(third)
    assert (count.rx_bytes, count.tx_bytes, count.connections) == (3500, 35, 2)
    for connection in (first, second):
        close(connection)
    count = meter.sample()
    assert (count.tx_bytes, count.connections, count.unheard) == (35, 0, 0)
    assert 3500 <= count.rx_bytes <= 3502, "the kernel counts a FIN as a byte"


def test_a_server_whose_peer_is_gone_already_counts_nothing(server):
    connection = exchange(server, 1000, 10)
    peer = "{}:{}".format(*connection[0].getsockname())
    close(connection)
    meter = ServedTraffic(peer)
    connection = exchange(server, 1000, 10)
    assert meter.sample().rx_bytes == 0
    close(connection)


def test_other_peers_and_the_other_end_are_not_counted(server):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        meter = TcpMeter(address_of(elsewhere))
        connection = exchange(server, 1000, 10)
        assert meter.sample() == type(meter.sample())(0, 0, 0, 0)
        close(connection)


def test_a_peers_name_is_resolved(server):
    meter = TcpMeter(f"localhost:{server.getsockname()[1]}")
    with contextlib.closing(socket.create_connection(server.getsockname())):
        assert meter.sample().connections == 1
    server.accept()[0].close()


def test_a_grpc_channel_is_seen_although_its_socket_is_dual_stack():
    def answer(request, context):
        del context
        return request[:10]

    handler = grpc.method_handlers_generic_handler("t", {"Put": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    meter = TcpMeter(f"127.0.0.1:{port}")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert channel.unary_unary("/t/Put")(b"x" * 1_000_000) == b"x" * 10
        count = meter.sample()
    server.stop(None).wait()
    assert count.connections == 1
    assert 1_000_000 < count.tx_bytes < 1_010_000
    assert 10 < count.rx_bytes < 10_000


def test_sampling_leaks_no_descriptor(server):
    meter = TcpMeter(address_of(server))
    meter.sample()
    gc.collect()  # what earlier tests left in cycles must not be closed in between
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        meter.sample()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
