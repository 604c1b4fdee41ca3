"""The destination role as its host knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dest_node.intake import Intake
from dest_node.servicer import MigrationServicer, register

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

    from host.context import HostContext

ARTEFACTS = ("dest_hashes",)


class DestRole:
    """Registered as "dest"."""

    name = "dest"

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._intake = Intake(host)

    def register(self, server: grpc.Server) -> None:
        """Serve sources."""
        register(MigrationServicer(self._intake), server)

    def recover(self) -> None:
        """Take up what the last process of this host left."""
        self._intake.recover()

    def artefact(self, name: str) -> Path | None:
        """Files that a completed migration left."""
        path = self._host.artefacts_dir / name
        return path if name in ARTEFACTS and path.exists() else None

    def stop(self) -> None:
        """Give up an attempt that is still being received."""
        self._intake.stop()
