"""A TCP relay on the loopback between source and destination: a link that a test cuts and restores.

Rule 1: what comes in on one side goes out on the other, byte for byte, counted per connection towards the
        destination.
Rule 2: `cut` resets every connection, and every new one at once, until `heal`.
"""

import contextlib
import socket
import struct
import threading

from testbed.node_client import NodeClient

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Relay:
    """Stands in for the destination's address of every run that is started while it is entered."""

    def __init__(self, monkeypatch):
        self.forward_bytes = []  # per connection, in their order
        self._target = None
        self._down = False
        self._lock = threading.Lock()
        self._open = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = []
        honest = NodeClient.describe

        def describe(client):
            told = honest(client)
            if client.origin == "dest":
                host, _, port = told.migration_address.rpartition(":")
                self._target = (host, int(port))
                told.migration_address = self.address
            return told

        monkeypatch.setattr(NodeClient, "describe", describe)

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a relay's thread does not end"

    def cut(self):
        """Nothing passes any more."""
        with self._lock:
            self._down = True
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    one.shutdown(socket.SHUT_RDWR)

    def heal(self):
        """Connections are possible again."""
        with self._lock:
            self._down = False

    def _start(self, body, *arguments):
        thread = threading.Thread(target=body, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                near, _ = self._listener.accept()
                with self._lock:
                    down = self._down
                if down:
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    near.close()
                    continue
                far = socket.create_connection(self._target)
                with self._lock:
                    self._open |= {near, far}
                    self.forward_bytes.append(0)
                    number = len(self.forward_bytes) - 1
                self._start(self._pump, near, far, number)
                self._start(self._pump, far, near, None)

    def _pump(self, origin, target, number):
        with contextlib.suppress(OSError):
            while data := origin.recv(1 << 16):
                if number is not None:
                    self.forward_bytes[number] += len(data)
                target.sendall(data)
        for one in (origin, target):
            with self._lock:
                self._open.discard(one)
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
