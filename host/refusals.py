"""Calls that this node refused, counted by method and kind, whoever made them.

Rule 1: every refused call is counted, whatever refused it: a certificate, bytes that are no message, the role.
Rule 2: the numbers are bounded: methods are those that are served, kinds are gRPC's status names.
Rule 3: a flood is no flood of events: a kind is told at its first, second, fourth, eighth … refusal.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.event_log import EventLog

REASON_CHARACTERS_MAX = 300  # a caller's words in our history: one line that a person reads
UNKNOWN_METHOD = "(unknown method)"


class RefusedCalls:
    """The counts of one node. Thread-safe."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()

    def add(self, method: str, kind: str) -> int:
        """One more; returns how many there are now of this method and kind."""
        with self._lock:
            kinds = self._counts.setdefault(method, {})
            kinds[kind] = kinds.get(kind, 0) + 1
            return kinds[kind]

    def counts(self) -> dict[str, dict[str, int]]:
        """A copy: method -> kind -> count."""
        with self._lock:
            return {method: dict(kinds) for method, kinds in self._counts.items()}


class Unreadable:
    """A request that is no message of its call."""


class CountRefusals(grpc.ServerInterceptor):
    """The outermost interceptor of a server: sees how every call ended."""

    def __init__(self, refused: RefusedCalls, events: EventLog) -> None:
        self._refused = refused
        self._events = events

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Wraps the method."""
        handler = continuation(handler_call_details)
        if handler is None:
            self._count(UNKNOWN_METHOD, "unimplemented", "")  # gRPC itself answers
            return None
        method = handler_call_details.method.rpartition("/")[2]
        streamed_in, streamed_out = handler.request_streaming, handler.response_streaming
        kind = f"{'stream' if streamed_in else 'unary'}_{'stream' if streamed_out else 'unary'}"
        behaviour = getattr(handler, kind)

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                _check(request, context)
                return behaviour(request, context)
            except Exception:
                self._ended(method, context)
                raise

        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                _check(request, context)
                yield from behaviour(request, context)
            except Exception:
                self._ended(method, context)
                raise

        wrap = getattr(grpc, f"{kind}_rpc_method_handler")
        read = handler.request_deserializer if streamed_in else _reader(handler.request_deserializer)
        return wrap(answers if streamed_out else answer, read, handler.response_serializer)

    def _ended(self, method: str, context: Any) -> None:
        code = context.code()
        kind = code.name.lower() if isinstance(code, grpc.StatusCode) else "unknown"
        details = context.details() or b""
        self._count(
            method, kind, details.decode("utf-8", "replace") if isinstance(details, bytes) else details
        )

    def _count(self, method: str, kind: str, reason: str) -> None:
        count = self._refused.add(method, kind)
        if count & (count - 1) == 0:
            shown = " ".join(reason.split())[:REASON_CHARACTERS_MAX]
            self._events.add("call_refused", method=method, kind=kind, count=count, reason=shown)


def _check(request: Any, context: grpc.ServicerContext) -> None:
    if isinstance(request, Unreadable):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no message of this call")


def _reader(deserializer: Any) -> Any:
    """As the method's own, but what cannot be read reaches the method: gRPC would write a traceback for each."""
    if deserializer is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except Exception:  # noqa: BLE001 - whatever protobuf raises, it is the caller's mistake
            return Unreadable()

    return read
