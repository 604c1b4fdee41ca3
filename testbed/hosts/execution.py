"""One command inside a container: its output as it comes, its status, and its connection closed afterwards.

Rule 1: the end of the output is the end of the command; the engine knows the status a moment later.
Rule 2: the connection is closed here: the SDK leaves that of an exec to the garbage collector.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from docker.utils.socket import frames_iter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STDOUT: Final = 1
STATUS_S: Final = 5.0  # the engine knows the status when the output has ended, or a moment later
LOOK_S: Final = 0.005  # between two questions for it


class Execution:
    """A started command. Errors are the SDK's own."""

    def __init__(
        self, container: Any, command: Sequence[str], *, user: str = "", takes_input: bool = False
    ) -> None:
        self._api = container.client.api
        made = self._api.exec_create(container.id, list(command), user=user, stdin=takes_input)
        self._id = str(made["Id"])
        self._socket = self._api.exec_start(self._id, socket=True)
        # Of a plain connection the SDK gives only a stream; its socket is below.
        self._real = getattr(self._socket, "_sock", None) or self._socket

    def output(self) -> Iterator[bytes]:
        """Standard output and error, mixed; ends with the command and closes the connection."""
        return (piece for _, piece in self.frames())

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """The same with the number of the stream: STDOUT or 2."""
        try:
            yield from frames_iter(self._socket, tty=False)
        finally:
            self._close()

    def write(self, data: bytes) -> None:
        """To its standard input. Raises OSError when it has ended."""
        self._real.sendall(data)

    def end_input(self) -> None:
        """Its standard input ends."""
        with contextlib.suppress(OSError):
            self._real.shutdown(socket.SHUT_WR)

    def pid(self) -> int:
        """Of the command on the engine's machine; 0 while the engine does not say."""
        return int(self._api.exec_inspect(self._id).get("Pid") or 0)

    def status(self) -> int | None:
        """The exit status, once the output has ended; None when the engine does not say."""
        deadline, moment = time.monotonic() + STATUS_S, threading.Event()
        while time.monotonic() < deadline:
            found = self._api.exec_inspect(self._id)
            if not found.get("Running") and found.get("ExitCode") is not None:
                return int(found["ExitCode"])
            moment.wait(LOOK_S)
        return None

    def _close(self) -> None:
        response = getattr(self._socket, "_response", None)
        for part in (response, self._socket, self._real):
            if part is not None:
                with contextlib.suppress(OSError):
                    part.close()


def run(container: Any, command: Sequence[str], *, user: str = "") -> tuple[int | None, str]:
    """(status, output) of a short command."""
    execution = Execution(container, command, user=user)
    said = b"".join(execution.output()).decode("utf-8", "replace")
    return execution.status(), said.strip()
