"""The control channel to a host on another machine: a unix socket here, carried by the engine's own connection.

Rule 1: no port is opened anywhere: whoever may use the engine may speak to the node, and nobody else.
Rule 2: a connection to the socket is one exec of `host.relay` beside the node; either end of it ends both.
Rule 3: that is started before it is needed, and the socket is there only while it waits: who connects is answered
        at once. gRPC gives a silent connection up within milliseconds and would start one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from typing import TYPE_CHECKING, Any, Final

from docker.errors import DockerException

from host.relay import READY
from testbed.hosts.container_process import INSIDE
from testbed.hosts.execution import STDOUT, Execution

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PIECE_BYTES: Final = 1 << 16
LOOK_S: Final = 0.05  # whether it is to end
END_S: Final = 5.0  # its threads end when their connections are shut


class Relay:
    """Listens at `path` whenever the node does; `close` undoes it."""

    def __init__(self, path: Path, container: Any, *, user: str) -> None:
        self._path = path
        self._container = container
        self._user = user
        self._closed = threading.Event()
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._carriers: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._serve, name=f"relay-{path.name}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Ends every connection and waits for its threads; when the container is gone, or its execs have ended."""
        self._closed.set()
        for one in (self._listener, *self._connections):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # closing alone wakes no thread that waits in it
        for thread in (self._acceptor, *self._carriers):
            thread.join(END_S)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._closed.is_set():
            ready = self._ready_exec()
            if ready is None:
                self._closed.wait(LOOK_S)  # the node does not listen yet, or its container does not run
                continue
            connection = self._accept()
            if connection is None:
                ready[0].end_input()
                return
            carrier = threading.Thread(target=self._carry, args=(connection, *ready), daemon=True)
            self._carriers.append(carrier)
            carrier.start()

    def _ready_exec(self) -> tuple[Execution, Iterator[tuple[int, bytes]]] | None:
        """An exec that is connected to the node, and the rest of its output."""
        command = ["python3", "-m", "host.relay", f"{INSIDE}/control.sock"]
        with contextlib.suppress(DockerException, OSError):
            execution = Execution(self._container, command, user=self._user, takes_input=True)
            frames = execution.frames()
            for stream, piece in frames:
                if stream == STDOUT:
                    return execution, itertools.chain([(STDOUT, piece[len(READY) :])], frames)
        return None

    def _accept(self) -> socket.socket | None:
        with socket.socket(socket.AF_UNIX) as listener:
            self._path.unlink(missing_ok=True)
            listener.bind(os.fspath(self._path))
            self._path.chmod(0o600)
            listener.listen(1)
            self._listener = listener
            try:
                if self._closed.is_set():
                    return None
                connection, _ = listener.accept()
            except OSError:  # closed
                return None
            finally:
                self._listener = None
        self._path.unlink(missing_ok=True)
        self._connections.add(connection)
        return connection

    def _carry(
        self, connection: socket.socket, execution: Execution, frames: Iterator[tuple[int, bytes]]
    ) -> None:
        inwards = threading.Thread(target=_carry_in, args=(connection, execution), daemon=True)
        inwards.start()
        with contextlib.suppress(DockerException, OSError):
            for stream, piece in frames:
                if stream == STDOUT and piece:
                    connection.sendall(piece)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        inwards.join()  # ends: the connection is shut
        connection.close()
        self._connections.discard(connection)


def _carry_in(connection: socket.socket, execution: Execution) -> None:
    with contextlib.suppress(OSError):
        while piece := connection.recv(PIECE_BYTES):
            execution.write(piece)
    execution.end_input()
