"""The end of an attempt whose process did not live to tell it: told by the one that was started in its place.

Rule 1: the journal has the outcome (ABORTED, COMPLETED); nothing is decided here, and nothing is told twice that
        the journal says was told.
Rule 2: what was measured died with the process: the event says so, and has no figures.
Rule 3: of a guest that was given away the evidence is still here, its frozen RAM: it is kept as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from host.errors import AgentError, AgentLost
from migration.commands import Cause
from source_node.artefacts import write_artefacts
from source_node.attempt_note import AttemptNote
from source_node.farewells import mark

if TYPE_CHECKING:
    from host.agent_link import Hello
    from host.context import HostContext
    from host.journal import Entry

HOLDS_GUEST = frozenset({"running", "paused"})  # states of an agent that has the guest of its epoch

log = structlog.get_logger()


def tell_end(host: HostContext, entry: Entry, hello: Hello) -> None:
    """Tell migration_ended for an attempt that is ABORTED or COMPLETED, and write down that it was told."""
    reason = AttemptNote.read(entry.detail).reason
    artefacts: list[str] = []
    missing = ["everything measured: the process that measured it is gone"]
    if entry.state == "COMPLETED":
        outcome, reason = "completed", "the destination runs the guest"
        artefacts = _evidence(host, hello, missing)
    elif hello.state in HOLDS_GUEST and hello.guest_epoch == entry.key.guest_epoch:
        outcome = "failed"
    else:
        outcome = "guest_lost"
    host.events.add(
        "migration_ended",
        outcome=outcome,
        reason=reason,
        cause=Cause.NONE.value if outcome == "completed" else Cause.HOST.value,
        artefacts=artefacts,
        missing=missing,
        bytes={},
        told_after_restart=True,
    )
    mark(host, entry.key, told=True)


def _evidence(host: HostContext, hello: Hello, missing: list[str]) -> list[str]:
    """Freeze what was given away, and keep what a judge will ask for; what is lacking is said."""
    try:
        if hello.state == "paused":
            host.guest.link.freeze()
        if host.guest.ram is None:
            missing.append("artefacts: the agent holds no guest any more")
            return []
        return write_artefacts(host, host.guest.ram, None, "full")
    except (AgentError, AgentLost, OSError) as error:
        log.exception("not_measured", what="artefacts")
        missing.append(f"artefacts: {' '.join(str(error).split())}")
        return []
