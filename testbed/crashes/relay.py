"""A TCP relay between two hosts that share the loopback: a link that can be cut and healed.

Rule 1: what comes in on one side goes out on the other, byte for byte, counted per connection towards the target.
Rule 2: `cut` resets every connection, and every new one at once, until `heal`.
Rule 3: every thread and socket of it is gone when it is left.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any, Final, Self

from testbed.errors import RunBrokenError

if TYPE_CHECKING:
    from collections.abc import Callable

PIECE_BYTES: Final = 1 << 16
JOIN_S: Final = 10.0  # its sockets are shut: a thread ends at its next look
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Relay:
    """Listens on the loopback and passes on to `target` ("host:port"), which may be set later."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.forward_bytes: list[int] = []  # per connection, in their order
        self._down = False
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                raise RunBrokenError("a thread of the relay does not end")

    def cut(self) -> None:
        """Nothing passes any more."""
        with self._lock:
            self._down = True
            for one in self._open:
                with contextlib.suppress(OSError):  # its peer was faster
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    one.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """Connections are possible again."""
        with self._lock:
            self._down = False

    def _start(self, body: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=body, args=arguments, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near, _ = self._listener.accept()
                self._join(near)

    def _join(self, near: socket.socket) -> None:
        with self._lock:
            down = self._down
        far = None
        if not down:
            host, _, port = self.target.rpartition(":")
            with contextlib.suppress(OSError):  # nobody listens there now, which is what the caller shall see
                far = socket.create_connection((host, int(port)))
        if far is None:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            near.close()
            return
        with self._lock:
            self._open |= {near, far}
            self.forward_bytes.append(0)
            number = len(self.forward_bytes) - 1
        self._start(self._pump, near, far, number)
        self._start(self._pump, far, near, None)

    def _pump(self, origin: socket.socket, target: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError):  # either side ended, or the link was cut
            while data := origin.recv(PIECE_BYTES):
                if number is not None:
                    self.forward_bytes[number] += len(data)
                target.sendall(data)
        for one in (origin, target):
            with self._lock:
                self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
