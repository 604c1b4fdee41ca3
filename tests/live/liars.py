"""Destinations that are none: what a source may meet at the other end of its connection."""

import socket
import threading
from concurrent import futures
from contextlib import ExitStack, contextmanager

import grpc

from migration.pb import migration_pb2 as pb

OPENED = pb.OpenReply(incarnation="0" * 32).SerializeToString()
GARBAGE = b"\xff\xff\xff\xff not a message \x00"


def acknowledge(count):
    """An answer of the page stream, whatever was sent."""
    return pb.ChunkAck(stored_below=count).SerializeToString()


def honest_pages(messages, _context):
    """Acknowledges everything and stores nothing."""
    for number, _ in enumerate(messages, 1):
        yield acknowledge(number)


def answers(reply):
    """A call that is answered with these bytes."""
    return grpc.unary_unary_rpc_method_handler(lambda _request, _context: reply)


def streams(behaviour):
    """The page stream, in bytes."""
    return grpc.stream_stream_rpc_method_handler(behaviour)


def says_once(reply):
    """A page stream that answers its first chunk with these bytes and then takes the rest in silence."""

    def behaviour(messages, _context):
        next(messages)
        yield reply
        for _ in messages:
            pass

    return streams(behaviour)


def _hangs_up(messages, _context):
    next(messages)
    yield from ()


def _loses_the_link(messages, context):
    next(messages)
    yield acknowledge(1)
    context.abort(grpc.StatusCode.UNAVAILABLE, "the link is gone")


def resumes_with(stored_below):
    """Opens honestly, loses the link, and says then that it has stored these."""

    def opens(data, _context):
        resumed = pb.OpenRequest.FromString(data).resume
        reply = pb.OpenReply(incarnation="0" * 32, stored_below=stored_below if resumed else ())
        return reply.SerializeToString()

    return {"Open": grpc.unary_unary_rpc_method_handler(opens), "Pages": streams(_loses_the_link)}


LIES = {
    "no such service": {},
    "open is garbage": {"Open": answers(GARBAGE)},
    "acknowledgement is garbage": {"Open": answers(OPENED), "Pages": says_once(GARBAGE)},
    "acknowledges what was never sent": {"Open": answers(OPENED), "Pages": says_once(acknowledge(10**15))},
    "hangs up": {"Open": answers(OPENED), "Pages": streams(_hangs_up)},
    "prepare is garbage": {
        "Open": answers(OPENED), "Pages": streams(honest_pages), "Prepare": answers(GARBAGE),
    },
    "prepare decides nothing": {
        "Open": answers(OPENED), "Pages": streams(honest_pages), "Prepare": answers(b""),
    },
    "prepare decides what does not exist": {
        "Open": answers(OPENED), "Pages": streams(honest_pages),
        "Prepare": answers(b"\x08\x4d"),  # decision = 77
    },
    "prepare is refused with no end of words": {
        "Open": answers(OPENED), "Pages": streams(honest_pages),
        "Prepare": answers(pb.PrepareReply(decision=3, reason="no\nno\n" * 1000).SerializeToString()),
    },
}  # fmt: skip


@contextmanager
def grpc_liar(methods):
    """A gRPC server with some of the Migration service's methods; its address."""
    server = grpc.server(
        futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 8 << 20)]
    )
    if methods:
        name = pb.DESCRIPTOR.services_by_name["Migration"].full_name
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@contextmanager
def tcp_liar(answer):
    """A plain TCP server that answers whatever it hears with these bytes, or with nothing; its address."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        taken = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                taken.append(connection)
                if answer:
                    connection.recv(1)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()
