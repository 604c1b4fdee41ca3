"""Roles: what a host does beyond holding a guest. The host finds them by name and never imports them.

Rule 1: a role is found by the entry point group "ballast.roles"; packages of roles depend on host, not the
        other way round.
Rule 2: a role may add services to the migration server, and undoes everything it began in `stop`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from host.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    import grpc

    from host.agent_link import Hello
    from host.context import HostContext
    from migration.events import Answer
    from migration.identity import AttemptKey
    from migration.pb import node_pb2

ENTRY_POINT_GROUP = "ballast.roles"


class RoleRefused(HostError):
    """A role cannot do what it was asked for in its present state; the message says why."""


class Role(Protocol):
    """What every role offers to its host."""

    name: str

    def register(self, server: grpc.Server) -> None:
        """Add the role's services to the migration server."""

    def recover_journal(self) -> None:
        """Close what the journal says was unfinished and cannot go on without the process that ended.

        Runs before anything is served: nobody may be answered from a state that is about to change.
        """

    def recover_guest(self) -> None:
        """Bring the guest, now that its agent was found, to where the journal says it must be."""

    def why_not_resume(self) -> str:
        """Why nobody may let the paused guest run by hand now; "" when this role has no objection."""

    def why_not_stand_by(self, hello: Hello) -> str:
        """Why the guest that the agent holds may not be let go of; "" when this role has no objection."""

    def stood_by(self) -> None:
        """The guest that was given away is let go of: this host holds none."""

    def artefact(self, name: str) -> Path | None:
        """The file of a recorded artefact, or None when this role has no such thing."""

    def stop(self) -> None:
        """End what is under way, in order and in bounded time."""


@runtime_checkable
class GivesGuestsAway(Protocol):
    """The further face of the source role."""

    def start_migration(self, request: node_pb2.MigrateRequest) -> None:
        """Begin; raises RoleRefused or ValueError (a bad field)."""

    def cancel(self, reason: str) -> tuple[bool, str]:
        """(whether it can still be effective, the phase)."""

    def measure_dirty_rate(self, period_ms: int, periods: int) -> node_pb2.DirtyRateReply:
        """See the schema; raises RoleRefused or ValueError (a bad field)."""


@runtime_checkable
class Resolves(Protocol):
    """The face of a role whose attempts may wait for a peer that never returns."""

    name: str

    def resolve(self, key: AttemptKey, verdict: Answer, image_digest: int, reason: str) -> str:
        """Have the attempt end so, on an operator's word; the state that the journal has then.

        Raises:
            RoleRefused: this host's journal or state does not allow it.
        """


def load_role(name: str, context: HostContext) -> Role:
    """Makes the role `name` for this host.

    Raises:
        RoleRefused: there is no such role.
    """
    known = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in known:
        raise RoleRefused(f"no role {name!r}; known roles: {', '.join(sorted(known)) or 'none'}")
    role: Role = known[name].load()(context)
    return role
