"""`kill`: a node, a guest agent or a whole container is killed (SIGKILL), and with `restart` started again.

A node that is started again has its journal and finds its guest agent, if that lives. A guest agent that is started
again is an empty standby: the guest was in the one that died. So is a container's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from testbed.faults.victims import VictimFault, container_of, process_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from testbed.faults.fault import Target, Undo
    from testbed.history import Origin
    from testbed.host_handles import Host


class Kill(VictimFault):
    """`for` is how long it stays dead, where it is started again."""

    kind: Literal["kill"]
    restart: bool = False
    heals_at_the_end: ClassVar[bool] = False  # a run that ends starts nothing again

    @property
    def rebuilds_network(self) -> bool:
        """A container's namespace ends with it."""
        return self.what == "container"

    @property
    def restarts(self) -> str:
        """What is started again."""
        names = {"guest_agent": f"{self.origin}-agent", "container": f"{self.origin}-node"}
        return names.get(self.what, f"{self.origin}-node") if self.restart else ""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """The dead stay dead unless they are started again."""
        yield from super().conflicts()
        if self.lasting_ms is not None and not self.restart:
            yield "for", "means nothing without restart = true: what was killed stays dead"
        # By hand it is `ballast fault heal` that ends it.
        if self.restart and self.at and self.lasting_ms is None:
            yield "for", "is missing: it says for how long it stays dead before it is started again"

    def apply(self, target: Target) -> Undo:
        """Kills it and waits for its end."""
        if self.what == "container":
            container_of(target.host).kill()
        else:
            process_of(target.host, self.what).kill()
        return {"origin": target.origin, "what": self.what, "restart": self.restart}

    @classmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Starts it again, where that was asked for and did not happen yet."""
        if not undo["restart"]:
            return {}
        host = hosts[undo["origin"]]
        if undo["what"] == "container":
            if not container_of(host).alive:
                container_of(host).start()
        elif not (process := process_of(host, undo["what"])).alive:
            process.restart()
        return {}
