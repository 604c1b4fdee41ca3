"""`python -m host.relay SOCKET`: standard input and output, carried to a unix socket and back.

A testbed whose engine is on another machine speaks to a node by this, through the engine's own connection.

Rule 1: it waits for the socket to appear, bounded, says READY when it is connected, and ends when the node does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

CONNECT_S = 10.0  # a node inside binds its socket in tenths of a second
LOOK_S = 0.02  # between two tries to connect
PIECE_BYTES = 1 << 16
READY = b"!"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 one side ended, 1 nobody listens."""
    path = (sys.argv[1:] if argv is None else argv)[0]
    try:
        connection = connected(path)
    except OSError as error:
        sys.stderr.write(f"host.relay: {path}: {error.strerror or error}\n")
        return 1
    write_all(READY)
    inwards = threading.Thread(target=carry_in, args=(connection,), daemon=True)
    inwards.start()
    while piece := connection.recv(PIECE_BYTES):
        write_all(piece)
    return 0


def connected(path: str) -> socket.socket:
    """A connection to the socket. Raises OSError when nobody listens in time."""
    deadline, moment = time.monotonic() + CONNECT_S, threading.Event()
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            moment.wait(LOOK_S)
        else:
            return connection


def carry_in(connection: socket.socket) -> None:
    """Until standard input ends; then the other side is told."""
    while piece := os.read(sys.stdin.fileno(), PIECE_BYTES):
        connection.sendall(piece)
    connection.shutdown(socket.SHUT_WR)


def write_all(piece: bytes) -> None:
    """To standard output."""
    while piece:
        piece = piece[os.write(sys.stdout.fileno(), piece) :]


if __name__ == "__main__":
    sys.exit(main())
