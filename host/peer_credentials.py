"""Whose process is at the other end of a unix socket (SO_PEERCRED, unix(7)).

The kernel tells the user of whoever called connect(2), or listen(2) at the other side. A socket file that is
0600 in a directory 0700 keeps others from connecting; this keeps us from believing a socket that others put there.

The node and the agent each have this rule: neither may import the other, and the one package that both may, virtio,
opens no sockets. tests/core/test_trust.py asks the same of both.
"""

from __future__ import annotations

import os
import socket
import struct

_UCRED = struct.Struct("@iII")  # pid, uid, gid


def why_not_trusted(connection: socket.socket) -> str:
    """Why this peer is not to be spoken with: its process is another user's. "" when it is ours."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    ours = os.geteuid()
    return "" if uid == ours else f"the peer is process {pid} of user {uid}, only user {ours} may talk here"
