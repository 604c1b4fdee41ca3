"""What the hosts of a run are, of whatever kind: started on entering, ended on leaving, the last one first.

Rule 1: a kind says how its hosts start, and puts on the stack how that is undone; all else is here.
Rule 2: what a node tells of itself, and how every process ended, is in the history.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeVar

from testbed.errors import RunBrokenError
from testbed.host_handles import Host
from testbed.hosts.certificates import make_run_authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from migration.pb import node_pb2
    from testbed.history import History, Origin
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.node_client import NodeClient
    from testbed.record.run_dir import RunDir
    from testbed.scenario.document import Scenario

SERVE_S: Final = 30.0  # a node starts in a second, on a loaded machine in some
END_S: Final = 5.0  # of SIGTERM; then SIGKILL
HURRY_S: Final = 0.5  # the same for a run that was interrupted

AnyHost = TypeVar("AnyHost", bound=Host)


class Ended(Protocol):
    """A process that is no more."""

    @property
    def name(self) -> str:
        """As in histories and log files."""
        ...

    @property
    def status(self) -> str:
        """How it ended."""
        ...

    asked_to_end: bool


class RunHosts(ABC, Generic[AnyHost]):
    """The hosts of a run; a context manager. `source` has the guest, the others wait for it."""

    def __init__(
        self,
        scenario: Scenario,
        run_id: str,
        *,
        run_dir: RunDir,
        runtime: RuntimeDir,
        history: History,
        interrupt: Interrupt,
    ) -> None:
        self._scenario = scenario
        self._run_id = run_id
        self._run_dir = run_dir
        self._runtime = runtime
        self._history = history
        self._interrupt = interrupt
        self._stack = ExitStack()
        self.authority = (
            make_run_authority(run_id, runtime.path / "tls") if scenario.hosts.encrypted else None
        )
        self.hosts: dict[Origin, AnyHost] = {}

    @abstractmethod
    def _begin(self, stack: ExitStack) -> None:
        """Starts every host, waits until each serves, and puts them into `hosts`. Raises RunBrokenError."""

    @abstractmethod
    def collect(self) -> None:
        """Brings what the agents have written so far into the run directory."""

    @property
    def source(self) -> AnyHost:
        """Where the guest is at first."""
        return self.hosts["source"]

    @property
    def dest(self) -> AnyHost:
        """Where it goes."""
        return self.hosts["dest"]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _describe(self, client: NodeClient) -> node_pb2.DescribeReply:
        """What a node that serves tells of itself."""
        described = client.describe()
        self._history.note(
            "node_described",
            host=client.origin,
            pid=described.pid,
            roles=list(described.roles),
            facts=json.loads(described.facts_json or "{}"),
        )
        return described

    def _shut_down(
        self, client: NodeClient, *, wake: Callable[[], None], wait: Callable[[float], object]
    ) -> None:
        """Asks the node by its own service, so that it tells its last events before it goes."""
        try:
            wake()  # a paused one would not answer
            client.shutdown()
        except RunBrokenError as error:
            self._history.note("shutdown_refused", host=client.origin, reason=str(error))
            return
        wait(END_S)
        client.wait_for_last_event(HURRY_S)

    def _note_end(self, process: Ended, last_words: Callable[[], str]) -> None:
        self._history.note(
            "process_ended",
            process=process.name,
            asked=process.asked_to_end,
            status=process.status,
            last_words="" if process.asked_to_end else last_words(),
        )
