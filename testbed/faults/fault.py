"""What a fault is: parameters from a scenario, something it does to a host, and a healer that remembers nothing.

Rule 1: a kind is one module with one class, found by the entry point group `ballast.faults`; its documentation is
        docs/faults/KIND.md.
Rule 2: `apply` either does all of it and returns a small JSON object, or undoes what it did and raises FaultError.
Rule 3: that object is all that `heal` needs, in this process or in another one, later; healing twice, or where the
        host is gone, does nothing.
Rule 4: what this machine or kind of host cannot produce is told by `lacks` before a run, never approximated.
Rule 5: packets are harmed where they arrive: `direction = "in"` is what comes to the host, "out" what its peers get
        from it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field

from testbed.documents import Model
from testbed.errors import UsageError
from testbed.faults import namespace
from testbed.faults.parameters import DurationMs, parse_moment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from testbed.history import Origin
    from testbed.host_handles import Host

ENTRY_POINT_GROUP: Final = "ballast.faults"
Scope: TypeAlias = Literal["network", "container", "process"]
Direction: TypeAlias = Literal["both", "in", "out"]
Undo: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Port:
    """A host's place in the run's network: a process in its namespace, and its address there."""

    origin: str
    pid: int
    address: str

    @classmethod
    def of(cls, host: Host) -> Port | None:
        """The host's, or None when it has no network of its own."""
        if host.network_pid is None:
            return None
        return cls(host.origin, host.network_pid, host.migration_address.rpartition(":")[0])


@dataclass(frozen=True, slots=True)
class Target:
    """What a fault is applied to. `label` names this one application: it is in every rule that is made."""

    hosts: Mapping[Origin, Host]
    origin: Origin
    label: str
    seed: int = 0
    ports: Sequence[Port] = field(default_factory=tuple)

    @property
    def host(self) -> Host:
        """The host that it happens to."""
        return self.hosts[self.origin]

    @property
    def port(self) -> Port:
        """Its place in the network."""
        return next(port for port in self.ports if port.origin == self.origin)

    @property
    def peers(self) -> list[Port]:
        """The other hosts' places."""
        return [port for port in self.ports if port.origin != self.origin]

    def receivers(self, direction: Direction) -> Iterator[tuple[Port, list[str]]]:
        """Where packets of this direction arrive, and from which addresses."""
        if direction in ("both", "in"):
            yield self.port, [peer.address for peer in self.peers]
        if direction in ("both", "out"):
            yield from ((peer, [self.port.address]) for peer in self.peers)

    def senders(self, direction: Direction) -> Iterator[Port]:
        """Where packets of this direction leave."""
        if direction in ("both", "out"):
            yield self.port
        if direction in ("both", "in"):
            yield from self.peers


class Fault(Model):
    """Base of all kinds. `at`, `for` and `leg` are the schedule's; a fault added by hand has none of them."""

    model_config = ConfigDict(populate_by_name=True)

    kind: str
    at: Annotated[str, BeforeValidator(parse_moment)] = ""  # a time, a round or a point, see parameters.py
    lasting_ms: Annotated[DurationMs | None, Field(alias="for")] = None  # None: until the run ends
    # In which it comes, counted from 1; None: where its moment comes first.
    leg: Annotated[int, Field(ge=1)] | None = None
    host: Literal["source", "dest", "third"] | None = None

    scope: ClassVar[Scope]
    heals_at_the_end: ClassVar[bool] = True  # whether a run that ends has any use for its healer

    @property
    def rebuilds_network(self) -> bool:
        """Whether the host has a new interface, or a new namespace, when it is healed."""
        return False

    @property
    def restarts(self) -> str:
        """The process that ends and is started again ("source-node"); "" where none is."""
        return ""

    @property
    def needs_containers(self) -> bool:
        """Whether hosts that are processes of this machine cannot have it."""
        return self.scope != "process"

    @property
    def origin(self) -> Origin:
        """The host that it happens to."""
        return self.host or "dest"

    @classmethod
    def lacks(cls) -> str:
        """What this machine lacks for it, in one line; "" when nothing."""
        return ""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What is wrong among its parameters, as (key, problem)."""
        yield from ()

    @abstractmethod
    def apply(self, target: Target) -> Undo:
        """Does it. Raises FaultError, and has then done nothing."""

    @classmethod
    @abstractmethod
    def heal(cls, undo: Undo, hosts: Mapping[Origin, Host]) -> dict[str, Any]:
        """Undoes it; what was counted meanwhile. `hosts` may be empty for a fault of scope "network".

        Raises:
            FaultError: it could not be undone.
        """

    @classmethod
    def handed_down(cls, undo: Undo, later: Sequence[Undo]) -> Undo | None:  # noqa: ARG003
        """What is left to undo while faults of this kind that came later are in force; None when nothing is.

        A kind that sets a value back changes `later`: the oldest one at the same place takes over what this one
        found there, since its own "before" is this one's doing.
        """
        return undo


class NetworkFault(Fault):
    """A fault of packets: needs hosts with a network of their own, and the right to enter it."""

    scope: ClassVar[Scope] = "network"
    direction: Direction = "both"


@dataclass(frozen=True, slots=True)
class Applied:
    """A fault in force. `description` is plain JSON, from which any process can heal it (`healing_of`)."""

    kind: str
    origin: str
    label: str
    undo: Undo

    @property
    def description(self) -> dict[str, Any]:
        """For a file."""
        return {"kind": self.kind, "origin": self.origin, "label": self.label, "undo": self.undo}

    def heal(
        self, hosts: Mapping[Origin, Host] | None = None, later: Sequence[Applied] = ()
    ) -> dict[str, Any]:
        """Undoes it, see Fault.heal. `later`: those in force that were applied after it, oldest first."""
        kind = kinds()[self.kind]
        undo = kind.handed_down(self.undo, [one.undo for one in later if one.kind == self.kind])
        return {} if undo is None else kind.heal(undo, hosts or {})


def apply(fault: Fault, target: Target) -> Applied:
    """Brings the fault into force. Raises FaultError."""
    return Applied(fault.kind, target.origin, target.label, fault.apply(target))


def healing_of(description: Mapping[str, Any]) -> Applied:
    """The fault in force that a `description` tells of."""
    return Applied(*(description[key] for key in ("kind", "origin", "label", "undo")))


def ports_of(hosts: Mapping[Origin, Host]) -> list[Port]:
    """The places of all hosts that have one."""
    return [port for host in hosts.values() if (port := Port.of(host)) is not None]


def is_same_network(pid: int, inode: int) -> bool:
    """Whether the namespace is still the one that was left."""
    return bool(inode) and namespace.inode_of(pid) == inode


def kinds() -> dict[str, type[Fault]]:
    """Every kind that is installed, by name."""
    return {point.name: point.load() for point in sorted(entry_points(group=ENTRY_POINT_GROUP))}


def parse_fault(kind: str, parameters: Mapping[str, Any]) -> Fault:
    """A fault from plain values, as of a command line. Raises UsageError or pydantic's ValidationError."""
    known = kinds()
    if kind not in known:
        raise UsageError(f"there is no fault {kind!r}; one of {', '.join(known)}")
    return known[kind].model_validate({"kind": kind, **parameters})
