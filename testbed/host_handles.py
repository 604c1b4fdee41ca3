"""What a run asks of its hosts, wherever they live: the one interface behind `--hosts`.

Rule 1: a host is a node process and a guest agent; each has a handle that outlives its process, so that a fault
        can kill it and its healer start it again.
Rule 2: what a kind of host cannot do raises CannotDoError with the reason; who needs it asks before
        the run.
Rule 3: the evidence that agents write (beats, oracle) is in the run directory after `collect`, wherever it was
        written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, Self

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from testbed.history import Origin
    from testbed.node_client import NodeClient

SHORT_NAMES: Final[dict[Origin, str]] = {"source": "a", "dest": "b", "third": "c"}


class CannotDoError(TestbedError):
    """This kind of host has no such thing; nothing was changed."""

    exit_code = 3


class HostProcess(Protocol):
    """A node or a guest agent; the handle stays the same when the process is started again."""

    asked_to_end: bool  # whether its end was ours

    @property
    def name(self) -> str:
        """As in histories and log files: source-node, dest-agent."""
        ...

    @property
    def pid(self) -> int:
        """On this machine; 0 when it runs on another machine."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        ...

    def last_words(self) -> str:
        """Why it ended, as far as its log tells; "" when it complained of nothing."""
        ...

    def cpu_seconds(self) -> float:
        """CPU time of it and its children so far; 0.0 when it is gone."""
        ...

    def kill(self) -> None:
        """SIGKILL; its end is then in the history. Does nothing when it has ended."""
        ...

    def pause(self) -> None:
        """SIGSTOP."""
        ...

    def resume(self) -> None:
        """SIGCONT."""
        ...

    def restart(self) -> None:
        """Starts it again where it has ended: a node with its journal, an agent as an empty standby one.

        Returns when it serves. Raises RunBrokenError when it does not come up.
        """
        ...


class Limits(NamedTuple):
    """What a container may use; 0 where there is no limit."""

    memory_bytes: int
    cpus: float


class HostContainer(Protocol):
    """The container that is a host. Errors of the engine are RunBrokenError."""

    @property
    def name(self) -> str:
        """As the engine knows it."""
        ...

    @property
    def address(self) -> str:
        """On the run's network."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        ...

    @property
    def elsewhere(self) -> bool:
        """Whether it is on another machine: its network cannot be looked at from here."""
        ...

    def pause(self) -> None:
        """Freezes all of it."""
        ...

    def unpause(self) -> None:
        """Thaws it."""
        ...

    def kill(self) -> None:
        """The host dies, and its guest with it."""
        ...

    def start(self) -> None:
        """Starts the host again: its node with its journal, and an empty standby agent."""
        ...

    def limit(self, *, memory_bytes: int | None = None, cpus: float | None = None) -> None:
        """Sets limits (0: none); what is None stays."""
        ...

    def limits(self) -> Limits:
        """As they are set now."""
        ...

    def disconnect(self) -> None:
        """Takes the host off the run's network."""
        ...

    def connect(self) -> None:
        """Puts it back, with the same address; the interface is a new one, and counts from 0."""
        ...


class Host(Protocol):
    """One host of a run."""

    @property
    def origin(self) -> Origin:
        """Its name in histories."""
        ...

    @property
    def node(self) -> HostProcess:
        """The node process."""
        ...

    @property
    def agent(self) -> HostProcess:
        """The guest agent."""
        ...

    @property
    def client(self) -> NodeClient:
        """Its Node service, by a channel that no fault touches."""
        ...

    @property
    def migration_address(self) -> str:
        """Where other hosts reach its Migration service."""
        ...

    @property
    def server_name(self) -> str:
        """The name in its certificate; "" where the link is plain."""
        ...

    @property
    def network_pid(self) -> int | None:
        """A process of this machine in the network namespace of the host's interface; None: it has no own one."""
        ...

    @property
    def container(self) -> HostContainer | None:
        """The container; None for processes of this machine."""
        ...


class Hosts(Protocol):
    """All hosts of a run, from entering to leaving."""

    @property
    def hosts(self) -> Mapping[Origin, Host]:
        """By name."""
        ...

    @property
    def source(self) -> Host:
        """Where the guest is at first."""
        ...

    @property
    def dest(self) -> Host:
        """Where it goes."""
        ...

    def collect(self) -> None:
        """Brings what the agents have written so far into the run directory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
