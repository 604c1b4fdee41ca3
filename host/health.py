"""`python -m host.health [ADDRESS]`: whether a node serves, by gRPC's health service; an image's HEALTHCHECK.

Rule 1: exit code 0 when it serves, 1 when it does not or does not answer; the reason is one line.
Rule 2: a container's root without capabilities may not look into another user's directory; it becomes that user.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ADDRESS_VARIABLE = "BALLAST_CONTROL"
WAIT_S = 5.0  # a node answers in milliseconds; the engine asks again


def main(argv: list[str] | None = None) -> int:
    """Asks the node at ADDRESS, or at $BALLAST_CONTROL."""
    words = sys.argv[1:] if argv is None else argv
    address = words[0] if words else os.environ.get(ADDRESS_VARIABLE, "")
    if not address:
        return _complain(f"name an address, or set {ADDRESS_VARIABLE}")
    become_owner(address)
    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=WAIT_S, wait_for_ready=True
            )
        except grpc.RpcError as error:
            code: object = getattr(error, "code", lambda: "no answer")()
            return _complain(f"{address}: {code}")
    serving: int = health_pb2.HealthCheckResponse.SERVING
    return 0 if reply.status == serving else _complain(f"{address}: does not serve")


def become_owner(address: str) -> None:
    """Root asks a unix socket as the user whose directory it is in; where that is not possible it asks as it is."""
    path = Path(address.removeprefix("unix:"))
    if os.geteuid() != 0 or not address.startswith("unix:") or not path.parent.is_dir():
        return
    owner = path.parent.stat()
    with contextlib.suppress(PermissionError):
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def _complain(reason: str) -> int:
    sys.stderr.write(f"host.health: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
