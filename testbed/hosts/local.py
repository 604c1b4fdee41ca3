"""Hosts as real processes on this machine, joined by loopback.

Rule 1: a host is a node process and a guest agent; they find each other by two unix sockets.
Rule 2: readiness is what a process says about itself, waited for with a deadline.
Rule 3: everything started here is undone here, in reverse; a process that died on its own is a fact in the
        history.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import psutil

from linux_guest.freezer import groups_named
from testbed.errors import RunBrokenError
from testbed.host_handles import SHORT_NAMES
from testbed.hosts.command_lines import Places, agent_arguments, node_arguments, write_workloads
from testbed.hosts.process import OwnedProcess
from testbed.hosts.run_hosts import END_S, HURRY_S, SERVE_S, RunHosts
from testbed.node_client import NodeClient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from testbed.history import Origin

RUN_LABEL: Final = "BALLAST_RUN"
RUNTIME_LABEL: Final = "BALLAST_RUNTIME"
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
    server_name: str  # of its certificate; "": plain text
    listens_at: str = ""  # its node, also one that is started again
    migration_address: str = ""  # what others are told: the same, unless somebody stands in between
    network_pid: int | None = field(default=None, init=False)
    container: None = field(default=None, init=False)


class LocalHosts(RunHosts[LocalHost]):
    """Of a run. They find each other's nodes at the addresses that those chose for themselves."""

    def collect(self) -> None:
        """Nothing to do: processes of this machine write into the run directory."""

    def _begin(self, stack: ExitStack) -> None:
        started = [self._start(stack, origin) for origin in reversed(self._scenario.origins)]
        for host in started:
            self._wait_until_serving(host.node, host.client)
            host.listens_at = host.migration_address = self._describe(host.client).migration_address
            self.hosts[host.origin] = host

    def _start(self, stack: ExitStack, origin: Origin) -> LocalHost:
        places = self._places(origin)
        self._run_dir.node(origin).mkdir()
        if origin == "source":
            write_workloads(self._scenario, self._run_dir.path / "workloads.json")
        stack.callback(self._end_groups)
        tls = None if self.authority is None else self.authority.issue(SHORT_NAMES[origin])
        client = NodeClient(origin, places.control, self._history)
        agent = LocalProcess(
            lambda again: self._process(
                f"{origin}-agent",
                agent_arguments(self._scenario, origin, places, standby=again or origin != "source"),
            )
        )
        stack.callback(self._end, agent)
        node = LocalProcess(
            lambda again: self._process(
                f"{origin}-node",
                node_arguments(
                    self._scenario,
                    origin,
                    places,
                    migration_address=self.hosts[origin].listens_at if again else ANY_PORT,
                    tls_dir=None if tls is None else tls.directory,
                ),
            ),
            wait_until_ready=lambda: self._wait_until_serving(node, client),
        )
        stack.callback(self._end, node)
        stack.callback(client.close)
        stack.callback(self._end_node, node, client)
        return LocalHost(origin, node, agent, client, server_name="" if tls is None else tls.server_name)

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

    @property
    def _environment(self) -> dict[str, str]:
        """Of every process: the machine's, and the labels by which `ballast clean` finds it."""
        return {**os.environ, RUN_LABEL: self._run_id, RUNTIME_LABEL: str(self._runtime.path)}

    def _end_groups(self) -> None:
        """The control group of a Linux guest whose agent was killed."""
        if self._scenario.guest.kind == "linux":
            for group in groups_named(f"ballast-{self._run_id}-*"):
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

    def _wait_until_serving(self, node: LocalProcess, client: NodeClient) -> None:
        try:
            client.wait_until_serving(SERVE_S, still_worth_it=lambda: node.alive)
        except RunBrokenError as error:
            raise RunBrokenError(f"{error}: {node.last_words() or 'it said nothing'}") from None

    def _end_node(self, node: LocalProcess, client: NodeClient) -> None:
        if not node.alive or self._interrupt.hurried:
            return
        node.asked_to_end = True
        self._shut_down(client, wake=node.resume, wait=node.current.wait)

    def _end(self, process: LocalProcess) -> None:
        process.current.end(HURRY_S if self._interrupt.hurried else END_S)

    def _exited(self, process: OwnedProcess) -> None:
        self._note_end(process, process.last_words)


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process of this machine and its children; 0.0 when it is gone."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]  # a Linux guest is its agent's children
        times = [member.cpu_times() for member in family]
    except psutil.NoSuchProcess:
        return 0.0
    return float(sum(used.user + used.system for used in times))
