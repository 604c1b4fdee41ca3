"""The Migration service on the wire: translates between messages and the intake.

Rule 1: a peer's mistake is INVALID_ARGUMENT or FAILED_PRECONDITION with one line; lack of room is
        RESOURCE_EXHAUSTED. Nothing a peer sends ends this process.
Rule 2: a page stream that ends otherwise than by the source's half-close is told to the intake, once, whatever
        state its generator is in.
Rule 3: the page streams together acknowledge every ACK_EVERY chunks, and at once when a chunk carries no pages.
Rule 4: of every page stream one message is taken out of gRPC while the one before it is stored.
"""

from __future__ import annotations

import sqlite3
import threading
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import structlog

from dest_node.intake import StreamEnd
from dest_node.outcomes import IntakeRefused
from dest_node.page_receiver import StreamOver
from dest_node.requests import check_open, check_prepare, key_of, line
from host.errors import AgentError, AgentLost, HostError, JournalConflict
from migration.errors import ProtocolError, RemoteProtocolError
from migration.pb import migration_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dest_node.arrivals import Arrivals
    from dest_node.intake import Intake
    from dest_node.page_receiver import PageReceiver, PageStreamIn

ACK_EVERY = 4  # a fourth of the source's window; an answer costs the interpreter about 0.1 ms

log = structlog.get_logger()


class MigrationServicer:
    """The methods of the schema's service, one each; `register` says how their bytes are read."""

    def __init__(self, intake: Intake, arrivals: Arrivals) -> None:
        self._intake = intake
        self._arrivals = arrivals

    def Open(  # noqa: N802 - the name is the schema's
        self, request: migration_pb2.OpenRequest, context: grpc.ServicerContext
    ) -> migration_pb2.OpenReply:
        """Reserve zeroed memory."""
        with answered(context):
            check_open(request)
            key = key_of(request.id)
            incarnation, stored_below = self._intake.open(
                key,
                request.memory_bytes,
                request.integrity,
                streams=request.streams or 1,
                resume=request.resume,
                link_timeout_ms=request.link_timeout_ms,
            )
            self._arrivals.opened(key, context.peer())
            return migration_pb2.OpenReply(
                incarnation=incarnation, stored_below=stored_below if request.resume else ()
            )

    def Prepare(  # noqa: N802
        self, request: migration_pb2.PrepareRequest, context: grpc.ServicerContext
    ) -> migration_pb2.PrepareReply:
        """Verify and restore."""
        with answered(context):
            check_prepare(request)
            reply = self._intake.prepare(key_of(request.id), request)
            return migration_pb2.PrepareReply(
                decision=decision(reply.answer.value), reason=reply.reason, verify_ns=self._intake.verify_ns
            )

    def Commit(  # noqa: N802
        self, request: migration_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> migration_pb2.CommitReply:
        """Decide."""
        # When it is answered, not before: the source waits for it. Forget may never come through.
        context.add_callback(self._arrivals.committed)
        with answered(context):
            reply = self._intake.commit(key_of(request.id), request.image_digest)
            return migration_pb2.CommitReply(
                decision=decision(reply.answer.value), reason=reply.reason, resume_ns=self._intake.resume_ns
            )

    def Abort(  # noqa: N802
        self, request: migration_pb2.AbortRequest, context: grpc.ServicerContext
    ) -> migration_pb2.AbortReply:
        """Give up."""
        with answered(context):
            reply = self._intake.abort(key_of(request.id), line(request.reason))
            self._arrivals.answered("abort")
            return migration_pb2.AbortReply(decision=decision(reply.answer.value))

    def Forget(  # noqa: N802
        self, request: migration_pb2.ForgetRequest, context: grpc.ServicerContext
    ) -> migration_pb2.ForgetReply:
        """Forget the outcome."""
        with answered(context):
            self._arrivals.answered("forget")
            self._intake.forget(key_of(request.id))
            return migration_pb2.ForgetReply()

    # -- pages ---------------------------------------------------------------------------------

    def Pages(  # noqa: N802
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[migration_pb2.ChunkAck]:
        """Raw chunks in, cumulative acknowledgements out."""
        with answered(context):
            receiver = self._intake.receiver()
            stream = receiver.begin_stream(context.cancel)
        ending = StreamEnd("the page stream was cut")

        def over() -> None:
            receiver.end_stream(stream)
            # Not on gRPC's thread: it may have to wait for the intake, and for the guest agent behind it.
            arguments = (receiver, stream, ending)
            threading.Thread(target=self._intake.stream_ended, args=arguments, daemon=True).start()

        # The call's end, not this generator's: gRPC never resumes a generator whose caller went away.
        if not context.add_callback(over):
            over()
            return
        try:
            yield from self._store(receiver, stream, messages)
        except (
            StreamOver
        ):  # it broke while a chunk was at hand: `over` has told, or a join has made it meaningless
            return
        except ProtocolError as error:
            ending.refused = f"bad page chunk: {' '.join(str(error).split())}"
            abort(context, grpc.StatusCode.INVALID_ARGUMENT, ending.refused)
        except (OSError, HostError) as error:
            ending.refused = f"cannot store pages: {error}"
            abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, ending.refused)
        except grpc.RpcError:  # raised by the iterator when the source's connection is gone
            log.info("page_stream_cut", stored_chunks=receiver.stored_chunks)
            return
        # A source that died may look like one that half-closed, for a moment. What follows tells: the intake
        # gives an attempt up that is neither sent to nor prepared.
        if context.is_active():
            ending.broken = ""

    def _store(
        self, receiver: PageReceiver, stream: PageStreamIn, messages: Iterator[bytes]
    ) -> Iterator[migration_pb2.ChunkAck]:
        every = max(ACK_EVERY // receiver.streams, 1)
        unanswered = 0
        for message in one_ahead(messages):
            chunk = receiver.store(stream, message)
            unanswered += 1
            asked = not (chunk.data_page_count or chunk.zero_page_count)
            if asked:
                self._arrivals.round_received(chunk.header.round_index)
            if unanswered == every or asked:
                unanswered = 0
                yield migration_pb2.ChunkAck(stored_below=chunk.header.sequence + 1)


def one_ahead(messages: Iterator[bytes]) -> Iterator[bytes]:
    """The same messages, each asked for before the one before it is used.

    gRPC begins to take a message out of its buffers when it is asked for it: a reader that first stores the one
    before has receiving and storing take turns, and one of two cores idle.

    Raises:
        grpc.RpcError: as `messages`, when the source's connection is gone.
    """
    thread = futures.ThreadPoolExecutor(1, "pages")
    try:
        coming = thread.submit(next, messages, None)
        while (message := coming.result()) is not None:  # ends: a message, or the call's end
            coming = thread.submit(next, messages, None)
            yield message
    finally:
        thread.shutdown(wait=False)  # it waits for the call's end


def register(servicer: MigrationServicer, server: grpc.Server) -> None:
    """Adds the service. Pages has an identity deserialiser: chunks are read by migration.codec."""
    pb = migration_pb2
    handlers = {
        "Open": _unary(servicer.Open, pb.OpenRequest, pb.OpenReply),
        "Prepare": _unary(servicer.Prepare, pb.PrepareRequest, pb.PrepareReply),
        "Commit": _unary(servicer.Commit, pb.CommitRequest, pb.CommitReply),
        "Abort": _unary(servicer.Abort, pb.AbortRequest, pb.AbortReply),
        "Forget": _unary(servicer.Forget, pb.ForgetRequest, pb.ForgetReply),
        "Pages": grpc.stream_stream_rpc_method_handler(
            servicer.Pages, request_deserializer=None, response_serializer=pb.ChunkAck.SerializeToString
        ),
    }
    name = pb.DESCRIPTOR.services_by_name["Migration"].full_name
    assert set(handlers) == {method.name for method in pb.DESCRIPTOR.services_by_name["Migration"].methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


def _unary(method: Any, request: Any, reply: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=request.FromString, response_serializer=reply.SerializeToString
    )


def decision(value: int) -> Any:
    """The answer as the schema's enum; the numbers agree on purpose."""
    assert value in migration_pb2.Decision.values(), value
    return value


def abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> NoReturn:
    """Ends the call with one line."""
    context.abort(code, reason)


@contextmanager
def answered(context: grpc.ServicerContext) -> Iterator[None]:
    """Errors become statuses."""
    try:
        yield
    except RemoteProtocolError as error:
        abort(context, grpc.StatusCode.FAILED_PRECONDITION, " ".join(str(error).split()))
    except IntakeRefused as error:
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except (AgentError, AgentLost, JournalConflict) as error:
        abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except (OSError, sqlite3.Error) as error:
        abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, f"this host cannot do it: {error}")
