"""Two hosts as real processes on this machine, joined by loopback.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from linux_guest.freezer import groups_named
from testbed.errors import RunBrokenError
from testbed.hosts.process import OwnedProcess
from testbed.node_client import NodeClient

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from testbed.history import History, Origin
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.run_dir import RunDir
    from testbed.scenario import Scenario

RUN_LABEL: Final = "BALLAST_RUN"
RUNTIME_LABEL: Final = "BALLAST_RUNTIME"
SERVE_S: Final = 30.0
END_S: Final = 5.0
HURRY_S: Final = 0.5
SHORT_NAMES: Final[dict[Origin, str]] = {"source": "a", "dest": "b"}
# A host that took a guest in can give it away again: every host has both roles.
ROLES: Final = ("source", "dest")


@dataclass(frozen=True, slots=True)
class LocalHost:
    """One host's processes and the way to speak to it."""

    origin: Origin
    node: OwnedProcess
    agent: OwnedProcess
    client: NodeClient
    migration_address: str


class LocalHosts:
    """Both hosts of a run; a context manager. `source` has the guest, `dest` waits for it."""

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
        self.hosts: dict[Origin, LocalHost] = {}

    @property
    def source(self) -> LocalHost:
        """Where the guest is at first."""
        return self.hosts["source"]

    @property
    def dest(self) -> LocalHost:
        """Where it goes."""
        return self.hosts["dest"]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            started = {origin: self._start(stack, origin) for origin in reversed(SHORT_NAMES)}
            for origin, (node, agent, client) in started.items():
                self.hosts[origin] = self._wait_for(origin, node, agent, client)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack, origin: Origin) -> tuple[OwnedProcess, OwnedProcess, NodeClient]:
        node_dir = self._run_dir.node(origin)
        node_dir.mkdir()
        short = SHORT_NAMES[origin]
        control = f"unix:{self._runtime.socket(f'{short}.control')}"
        sockets = [
            "--vhost-socket", str(self._runtime.socket(f"{short}.vhost")),
            "--agent-socket", str(self._runtime.socket(f"{short}.agent")),
        ]  # fmt: skip
        stack.callback(self._end_groups)
        agent = self._process(stack, f"{origin}-agent", [
            self._agent_module(origin), "--name", short, *sockets, *self._agent_arguments(origin),
        ])  # fmt: skip
        node = self._process(stack, f"{origin}-node", [
            "host", "--name", short, *(word for role in ROLES for word in ("--role", role)), *sockets,
            "--run-dir", str(node_dir), "--journal", str(node_dir / "journal.sqlite"),
            "--control", control, "--migration-address", "127.0.0.1:0",
            "--guest-memory-max", str(self._scenario.hosts.guest_memory_max),
        ])  # fmt: skip
        client = NodeClient(origin, control, self._history)
        stack.callback(client.close)
        stack.callback(self._end_node, node, client)
        return node, agent, client

    def _end_groups(self) -> None:
        """The control group of a Linux guest whose agent was killed."""
        if self._scenario.guest.kind == "linux":
            for group in groups_named(f"ballast-{self._environment[RUN_LABEL]}-*"):
                group.end()

    def _agent_module(self, origin: Origin) -> str:
        """A Linux guest is at the source; whoever waits at the destination waits in vain."""
        linux = self._scenario.guest.kind == "linux" and origin == "source"
        return "linux_guest" if linux else "guest_agent"

    def _agent_arguments(self, origin: Origin) -> list[str]:
        arguments = [
            "--memory", str(self._scenario.guest.memory),
            "--seed", str(self._scenario.seed),
            "--beats", str(self._run_dir.artefact(f"{origin}.beats")),
            "--oracle", str(self._run_dir.artefact(f"{origin}.oracle")),
        ]  # fmt: skip
        if origin == "dest":
            return [*arguments, "--standby"]
        workloads = self._run_dir.path / "workloads.json"
        chosen = [workload.model_dump() for workload in self._scenario.guest.workload]
        balloon = self._scenario.balloon.driver_options()
        guest = {"workloads": chosen, "balloon": balloon}
        workloads.write_text(json.dumps(guest, indent=2), encoding="utf-8")
        if self._scenario.guest.kind == "linux":
            arguments += ["--markers", str(self._run_dir.artefact("markers.json"))]
        return [*arguments, "--workloads", str(workloads)]

    def _process(self, stack: ExitStack, name: str, module_and_arguments: Sequence[str]) -> OwnedProcess:
        process = OwnedProcess(
            name,
            [sys.executable, "-m", *module_and_arguments, "--die-with-parent"],
            log=self._run_dir.logs / f"{name}.log",
            environment=self._environment,
            on_exit=self._exited,
        )
        stack.callback(self._end, process)
        self._history.note("process_started", process=name, pid=process.pid)
        return process

    def _wait_for(
        self, origin: Origin, node: OwnedProcess, agent: OwnedProcess, client: NodeClient
    ) -> LocalHost:
        try:
            client.wait_until_serving(SERVE_S, still_worth_it=lambda: node.alive)
        except RunBrokenError as error:
            raise RunBrokenError(f"{error}: {node.last_words() or 'it said nothing'}") from None
        described = client.describe()
        self._history.note(
            "node_described",
            host=origin,
            pid=described.pid,
            roles=list(described.roles),
            facts=json.loads(described.facts_json or "{}"),
        )
        return LocalHost(origin, node, agent, client, described.migration_address)

    def _end_node(self, node: OwnedProcess, client: NodeClient) -> None:
        """Asks the node by its own service, so that it tells its last events before it goes."""
        if not node.alive or self._interrupt.hurried:
            return
        node.asked_to_end = True
        try:
            client.shutdown()
        except RunBrokenError as error:
            self._history.note("shutdown_refused", host=client.origin, reason=str(error))
            return
        node.wait(END_S)
        client.wait_for_last_event(HURRY_S)

    def _end(self, process: OwnedProcess) -> None:
        process.end(HURRY_S if self._interrupt.hurried else END_S)

    def _exited(self, process: OwnedProcess) -> None:
        self._history.note(
            "process_ended",
            process=process.name,
            asked=process.asked_to_end,
            status=process.status,
            last_words="" if process.asked_to_end else process.last_words(),
        )
