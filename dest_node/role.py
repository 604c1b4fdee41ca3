"""The destination role as its host knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dest_node.arrivals import Arrivals
from dest_node.intake import TAKE_OVER_S_MAX, Intake
from dest_node.outcomes import IntakeRefused
from dest_node.read_back import READ_BACK
from dest_node.servicer import MigrationServicer, register
from host.roles import RoleRefused
from migration.errors import RemoteProtocolError
from migration.events import Answer

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

    from host.agent_link import Hello
    from host.context import HostContext
    from migration.identity import AttemptKey

ARTEFACTS = (READ_BACK,)


class DestRole:
    """Registered as "dest"."""

    name = "dest"

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._intake = Intake(host)

    def register(self, server: grpc.Server) -> None:
        """Serve sources."""
        register(MigrationServicer(self._intake, Arrivals(self._host.events)), server)

    def recover_journal(self) -> None:
        """Close what was received by a process that is gone."""
        self._intake.recover_journal()

    def recover_guest(self) -> None:
        """Run what was committed, drop what was not."""
        self._intake.recover_guest()

    def why_not_resume(self) -> str:
        """A guest that was taken in runs, or was never promised: nothing of ours stands against it."""
        return ""

    def why_not_stand_by(self, hello: Hello) -> str:
        """Whose guest it is, is the source role's question."""
        return ""

    def stood_by(self) -> None:
        """Room for another guest."""
        self._intake.stood_by()

    def resolve(self, key: AttemptKey, verdict: Answer, image_digest: int, reason: str) -> str:
        """The source's last word, by an operator. Raises RoleRefused."""
        if self._host.journal.get(key, "dest") is None:
            raise RoleRefused(f"attempt {key} is not known here")
        try:
            if verdict is Answer.COMMITTED:
                reply = self._intake.commit(key, image_digest, reason)
            else:
                reply = self._intake.abort(key, reason)
        except (IntakeRefused, RemoteProtocolError) as error:
            raise RoleRefused(str(error)) from error
        if reply.answer is not verdict:
            raise RoleRefused(f"attempt {key} is {reply.answer.name} here: {reply.reason}".rstrip(": "))
        entry = self._host.journal.get(key, "dest")
        return entry.state if entry is not None else ""

    def artefact(self, name: str) -> Path | None:
        """Files that a completed migration left."""
        self._intake.settled(TAKE_OVER_S_MAX)
        path = self._host.artefacts_dir / name
        return path if name in ARTEFACTS and path.exists() else None

    def stop(self) -> None:
        """Give up an attempt that is still being received."""
        self._intake.stop()
