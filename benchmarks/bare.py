"""The bare streams that Ballast's page stream is held against: nothing but the transport (and a store).

    python benchmarks/bare.py receive {tcp,grpc,store}         prints its port, serves one transfer per line
    python benchmarks/bare.py send {tcp,grpc} PORT --bytes N --message-bytes M   prints one JSON line

Both ends are processes of their own, as Ballast's nodes are. Messages are 1 MiB unless said, 64 MiB of different
ones of random bytes in turn. "store" writes every message to the next place of a fresh memfd by pwrite, as a
destination does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

MESSAGE_BYTES = 1 << 20
DIFFERENT_BYTES = 64 << 20
METHOD = "/ballast.bench.Bare/Stream"
OPTIONS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]


def cpu_seconds() -> float:
    """Of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def say(**fields: object) -> None:
    """One JSON line for the benchmark that started us."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class Stream:
    """The server side of one gRPC stream."""

    def __init__(self, store: bool) -> None:
        self._store = store

    def __call__(self, messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        """Takes everything in, then answers once."""
        started = cpu_seconds()
        total = self._store_all(messages) if self._store else sum(map(len, messages))
        say(bytes=total, cpu_seconds=cpu_seconds() - started)
        yield b"done"

    @staticmethod
    def _store_all(messages: Iterator[bytes]) -> int:
        memfd = os.memfd_create("bare")
        position = 0
        for message in messages:
            position += os.pwrite(memfd, message, position)
        os.close(memfd)
        return position


class Link(NamedTuple):
    """Where the receiver is, and the certificates of mutual TLS where it is used (ca.pem, cert.pem, key.pem)."""

    address: str
    tls_dir: Path | None
    server_name: str

    def read(self) -> list[bytes]:
        """Authority, certificate, key."""
        assert self.tls_dir is not None
        return [(self.tls_dir / name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem")]

    def bind(self, server: grpc.Server) -> int:
        """A port that the machine chooses."""
        if self.tls_dir is None:
            return int(server.add_insecure_port(f"{self.address}:0"))
        ca, cert, key = self.read()
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        return int(server.add_secure_port(f"{self.address}:0", credentials))

    def channel(self, port: int) -> grpc.Channel:
        """To that port."""
        if self.tls_dir is None:
            return grpc.insecure_channel(f"{self.address}:{port}", options=OPTIONS)
        ca, cert, key = self.read()
        named = [*OPTIONS, ("grpc.ssl_target_name_override", self.server_name)]
        return grpc.secure_channel(
            f"{self.address}:{port}", grpc.ssl_channel_credentials(ca, key, cert), options=named
        )


def receive_grpc(store: bool, link: Link) -> None:
    """Serve until stdin ends."""
    handler = grpc.stream_stream_rpc_method_handler(Stream(store))
    server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
    service, _, method = METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    say(port=link.bind(server))
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


def receive_tcp(link: Link) -> None:
    """One connection after the other, until one of them sends nothing."""
    with socket.create_server((link.address, 0)) as listener:
        say(port=listener.getsockname()[1])
        buffer = bytearray(MESSAGE_BYTES)
        while True:
            connection, _ = listener.accept()
            started, total = cpu_seconds(), 0
            with connection:
                while count := connection.recv_into(buffer):
                    total += count
                if not total:
                    return
                connection.sendall(b"done")
            say(bytes=total, cpu_seconds=cpu_seconds() - started)


def messages(total: int, message_bytes: int) -> Iterator[bytes]:
    """`total` bytes in messages."""
    pool = [os.urandom(message_bytes) for _ in range(DIFFERENT_BYTES // message_bytes)]
    for index in range(total // message_bytes):
        yield pool[index % len(pool)]


def send(transport: str, port: int, total: int, message_bytes: int, link: Link) -> None:
    """One transfer; the clock runs from the first message until the receiver has said that it has all."""
    prepared = list(messages(total, message_bytes))
    if transport == "tcp":
        with socket.create_connection((link.address, port)) as connection:
            started, cpu = time.monotonic(), cpu_seconds()
            for message in prepared:
                connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4)
            seconds = time.monotonic() - started
    else:
        with link.channel(port) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
            call = channel.stream_stream(METHOD)
            started, cpu = time.monotonic(), cpu_seconds()
            list(call(iter(prepared)))
            seconds = time.monotonic() - started
    say(seconds=seconds, cpu_seconds=cpu_seconds() - cpu, bytes=total)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    receiving = actions.add_parser("receive")
    receiving.add_argument("kind", choices=["tcp", "grpc", "store"])
    sending = actions.add_parser("send")
    sending.add_argument("transport", choices=["tcp", "grpc"])
    sending.add_argument("port", type=int)
    sending.add_argument("--bytes", type=int, default=1 << 30)
    sending.add_argument("--message-bytes", type=int, default=MESSAGE_BYTES)
    for one in (receiving, sending):
        one.add_argument("--address", default="127.0.0.1", help="of the receiver")
        one.add_argument("--tls-dir", type=Path, help="gRPC with mutual TLS: ca.pem, cert.pem, key.pem")
        one.add_argument("--server-name", default="", help="in the receiver's certificate")
    options = parser.parse_args()
    link = Link(options.address, options.tls_dir, options.server_name)
    if options.action == "send":
        send(options.transport, options.port, options.bytes, options.message_bytes, link)
    elif options.kind == "tcp":
        receive_tcp(link)
    else:
        receive_grpc(options.kind == "store", link)


if __name__ == "__main__":
    main()
