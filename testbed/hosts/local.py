"""Hosts as real processes on this machine, joined by loopback.

Rule 1: a host is a node process and a guest agent; they find each other by two unix sockets.
Rule 2: readiness is what a process says about itself, waited for with a deadline.
Rule 3: everything started here is undone here, in reverse; a process that died on its own is a fact in the
        history.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

import psutil

from linux_guest.freezer import groups_named
from testbed.errors import RunBrokenError
from testbed.host_handles import SHORT_NAMES
from testbed.hosts.certificates import make_run_authority
from testbed.hosts.command_lines import Places, agent_arguments, node_arguments, write_workloads
from testbed.hosts.process import OwnedProcess
from testbed.node_client import NodeClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from testbed.history import History, Origin
    from testbed.hosts.certificates import PemFiles
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.record.run_dir import RunDir
    from testbed.scenario.document import Scenario

RUN_LABEL: Final = "BALLAST_RUN"
RUNTIME_LABEL: Final = "BALLAST_RUNTIME"
SERVE_S: Final = 30.0  # a node starts in a second, on a loaded machine in some
END_S: Final = 5.0  # of SIGTERM; then SIGKILL
HURRY_S: Final = 0.5  # the same for a run that was interrupted
ANY_PORT: Final = "127.0.0.1:0"


class LocalProcess:
    """A process of this machine that can be started again (HostProcess)."""

    def __init__(
        self, start: Callable[[bool], OwnedProcess], wait_until_ready: Callable[[], None] | None = None
    ) -> None:
        self._start = start
        self._wait_until_ready = wait_until_ready
        self.current = start(False)

    @property
    def asked_to_end(self) -> bool:
        """Whether its end was ours."""
        return self.current.asked_to_end

    @asked_to_end.setter
    def asked_to_end(self, ours: bool) -> None:
        self.current.asked_to_end = ours

    @property
    def name(self) -> str:
        """As in histories and log files."""
        return self.current.name

    @property
    def pid(self) -> int:
        """Of the newest process."""
        return self.current.pid

    @property
    def alive(self) -> bool:
        """Whether the newest process has not ended."""
        return self.current.alive

    def last_words(self) -> str:
        """What its log ends with."""
        return self.current.last_words()

    def cpu_seconds(self) -> float:
        """Of it and its children; 0.0 when it is gone."""
        return cpu_seconds(self.current.pid)

    def kill(self) -> None:
        """SIGKILL, and waits for the end, which is then in the history."""
        self.current.kill()

    def pause(self) -> None:
        """SIGSTOP."""
        self.current.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.current.resume()

    def restart(self) -> None:
        """A new process in place of one that ended. Raises RunBrokenError when it does not come up."""
        if self.alive:
            raise RunBrokenError(f"the {self.name} runs: there is nothing to start again")
        self.current = self._start(True)
        if self._wait_until_ready is not None:
            self._wait_until_ready()


@dataclass(slots=True)
class LocalHost:
    """One host's processes and the way to speak to it."""

    origin: Origin
    node: LocalProcess
    agent: LocalProcess
    client: NodeClient
    migration_address: str
    server_name: str = ""  # of its certificate; "": plain text
    network_pid: int | None = field(default=None, init=False)
    container: None = field(default=None, init=False)


class LocalHosts:
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
        self._run_dir = run_dir
        self._runtime = runtime
        self._history = history
        self._interrupt = interrupt
        self._environment = {**os.environ, RUN_LABEL: run_id, RUNTIME_LABEL: str(runtime.path)}
        self._stack = ExitStack()
        self._addresses: dict[Origin, str] = {}
        self.authority = (
            make_run_authority(run_id, runtime.path / "tls") if scenario.hosts.encrypted else None
        )
        self._certificates: dict[Origin, PemFiles] = {}
        self.hosts: dict[Origin, LocalHost] = {}

    @property
    def source(self) -> LocalHost:
        """Where the guest is at first."""
        return self.hosts["source"]

    @property
    def dest(self) -> LocalHost:
        """Where it goes."""
        return self.hosts["dest"]

    def collect(self) -> None:
        """Nothing to do: processes of this machine write into the run directory."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            started = {origin: self._start(stack, origin) for origin in reversed(self._scenario.origins)}
            for origin, (node, agent, client) in started.items():
                self.hosts[origin] = self._wait_for(origin, node, agent, client)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack, origin: Origin) -> tuple[LocalProcess, LocalProcess, NodeClient]:
        places = self._places(origin)
        self._run_dir.node(origin).mkdir()
        if origin == "source":
            write_workloads(self._scenario, self._run_dir.path / "workloads.json")
        stack.callback(self._end_groups)
        if self.authority is not None:
            self._certificates[origin] = self.authority.issue(SHORT_NAMES[origin])
        certificate = self._certificates.get(origin)
        client = NodeClient(origin, places.control, self._history)
        agent = LocalProcess(
            lambda again: self._process(
                f"{origin}-agent",
                agent_arguments(self._scenario, origin, places, standby=again or origin != "source"),
            )
        )
        stack.callback(self._end, agent)
        node = LocalProcess(
            lambda _: self._process(
                f"{origin}-node",
                node_arguments(
                    self._scenario,
                    origin,
                    places,
                    migration_address=self._addresses.get(origin, ANY_PORT),
                    tls_dir=None if certificate is None else certificate.directory,
                ),
            ),
            wait_until_ready=lambda: self._wait_until_serving(node, client),
        )
        stack.callback(self._end, node)
        stack.callback(client.close)
        stack.callback(self._end_node, node, client)
        return node, agent, client

    def _places(self, origin: Origin) -> Places:
        short = SHORT_NAMES[origin]
        return Places(
            vhost_socket=self._runtime.socket(f"{short}.vhost"),
            agent_socket=self._runtime.socket(f"{short}.agent"),
            control=f"unix:{self._runtime.socket(f'{short}.control')}",
            node_dir=self._run_dir.node(origin),
            beats=self._run_dir.artefact(f"{origin}.beats"),
            oracle=self._run_dir.artefact(f"{origin}.oracle"),
            markers=self._run_dir.artefact("markers.json"),
            workloads=self._run_dir.path / "workloads.json",
        )

    def _end_groups(self) -> None:
        """The control group of a Linux guest whose agent was killed."""
        if self._scenario.guest.kind == "linux":
            for group in groups_named(f"ballast-{self._environment[RUN_LABEL]}-*"):
                group.end()

    def _process(self, name: str, module_and_arguments: Sequence[str]) -> OwnedProcess:
        process = OwnedProcess(
            name,
            [sys.executable, "-m", *module_and_arguments, "--die-with-parent"],
            log=self._run_dir.logs / f"{name}.log",
            environment=self._environment,
            on_exit=self._exited,
        )
        self._history.note("process_started", process=name, pid=process.pid)
        return process

    def _wait_for(
        self, origin: Origin, node: LocalProcess, agent: LocalProcess, client: NodeClient
    ) -> LocalHost:
        self._wait_until_serving(node, client)
        described = client.describe()
        self._history.note(
            "node_described",
            host=origin,
            pid=described.pid,
            roles=list(described.roles),
            facts=json.loads(described.facts_json or "{}"),
        )
        # A node that is started again must be found where the first one was.
        self._addresses[origin] = described.migration_address
        certificate = self._certificates.get(origin)
        name = "" if certificate is None else certificate.server_name
        return LocalHost(origin, node, agent, client, described.migration_address, name)

    def _wait_until_serving(self, node: LocalProcess, client: NodeClient) -> None:
        try:
            client.wait_until_serving(SERVE_S, still_worth_it=lambda: node.alive)
        except RunBrokenError as error:
            raise RunBrokenError(f"{error}: {node.last_words() or 'it said nothing'}") from None

    def _end_node(self, node: LocalProcess, client: NodeClient) -> None:
        """Asks the node by its own service, so that it tells its last events before it goes."""
        if not node.alive or self._interrupt.hurried:
            return
        node.asked_to_end = True
        node.resume()  # a paused one would not answer
        try:
            client.shutdown()
        except RunBrokenError as error:
            self._history.note("shutdown_refused", host=client.origin, reason=str(error))
            return
        node.current.wait(END_S)
        client.wait_for_last_event(HURRY_S)

    def _end(self, process: LocalProcess) -> None:
        process.current.end(HURRY_S if self._interrupt.hurried else END_S)

    def _exited(self, process: OwnedProcess) -> None:
        self._history.note(
            "process_ended",
            process=process.name,
            asked=process.asked_to_end,
            status=process.status,
            last_words="" if process.asked_to_end else process.last_words(),
        )


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process of this machine and its children; 0.0 when it is gone."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]  # a Linux guest is its agent's children
        times = [member.cpu_times() for member in family]
    except psutil.NoSuchProcess:
        return 0.0
    return float(sum(used.user + used.system for used in times))
