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
from typing import TYPE_CHECKING

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


def receive_grpc(store: bool) -> None:
    """Serve until stdin ends."""
    handler = grpc.stream_stream_rpc_method_handler(Stream(store))
    server = grpc.server(futures.ThreadPoolExecutor(2), options=OPTIONS)
    service, _, method = METHOD[1:].partition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    say(port=server.add_insecure_port("127.0.0.1:0"))
    server.start()
    sys.stdin.read()
    server.stop(None).wait()


def receive_tcp() -> None:
    """One connection after the other, until one of them sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
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


def send(transport: str, port: int, total: int, message_bytes: int) -> None:
    """One transfer; the clock runs from the first message until the receiver has said that it has all."""
    prepared = list(messages(total, message_bytes))
    if transport == "tcp":
        with socket.create_connection(("127.0.0.1", port)) as connection:
            started, cpu = time.monotonic(), cpu_seconds()
            for message in prepared:
                connection.sendall(message)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4)
            seconds = time.monotonic() - started
    else:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
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
    options = parser.parse_args()
    if options.action == "send":
        send(options.transport, options.port, options.bytes, options.message_bytes)
    elif options.kind == "tcp":
        receive_tcp()
    else:
        receive_grpc(options.kind == "store")


if __name__ == "__main__":
    main()
