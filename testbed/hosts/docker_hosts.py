"""Hosts as containers of a Docker engine, on a network that the run makes for itself.

Rule 1: a host is one container with a node process and a guest agent. Its control channel is no network: a unix
        socket that is shared with this machine, or the engine's own connection (sharing.py).
Rule 2: everything that is made carries the run's labels and is removed when the run ends, in reverse; what a kill
        of this process leaves is found by those labels (`ballast clean`).
Rule 3: a process that ended by itself is a fact in the history, and so is memory that was spent.
"""

from __future__ import annotations

import functools
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from testbed.errors import RunBrokenError
from testbed.host_handles import SHORT_NAMES
from testbed.hosts import labels, leftovers
from testbed.hosts.certificates import make_run_authority
from testbed.hosts.command_lines import Places, agent_arguments, node_arguments, write_workloads
from testbed.hosts.container import DATA, TLS, RunContainer, inside_user
from testbed.hosts.container_process import INSIDE, ContainerProcess
from testbed.hosts.docker_network import MIGRATION_PORT, RunNetwork
from testbed.hosts.engine import Engine, connect
from testbed.hosts.image import ensure
from testbed.hosts.local import END_S, HURRY_S, SERVE_S
from testbed.hosts.sharing import CopiedVolumes, SharedDirectories, Sharing
from testbed.node_client import NodeClient
from testbed.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from testbed.history import History, Origin
    from testbed.hosts.certificates import PemFiles
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.record.run_dir import RunDir
    from testbed.scenario.document import Scenario


@dataclass(slots=True)
class DockerHost:
    """One host's container and its processes."""

    origin: Origin
    node: ContainerProcess
    agent: ContainerProcess
    client: NodeClient
    container: RunContainer
    migration_address: str
    server_name: str = ""

    @property
    def network_pid(self) -> int | None:
        """The container's first process: it lives as long as the network namespace."""
        return self.container.pid or None


class DockerHosts:
    """The hosts of a run; a context manager."""

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
        self._authority = (
            make_run_authority(run_id, runtime.path / "tls") if scenario.hosts.encrypted else None
        )
        self._stack = ExitStack()
        self._images: dict[str, str] = {}  # by engine
        self._engines: dict[Origin, Engine] = {}
        self._sharings: dict[Origin, Sharing] = {}
        self.hosts: dict[Origin, DockerHost] = {}

    @property
    def source(self) -> DockerHost:
        """Where the guest is at first."""
        return self.hosts["source"]

    @property
    def dest(self) -> DockerHost:
        """Where it goes."""
        return self.hosts["dest"]

    def collect(self) -> None:
        """Brings what the agents have written so far into the run directory."""
        for origin, host in self.hosts.items():
            self._sharings[origin].collect(host.container)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            networks = self._connect(stack)
            for origin in reversed(self._scenario.origins):
                self.hosts[origin] = self._start(stack, origin, networks)
            for host in self.hosts.values():
                self._wait_for(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- engines and networks ------------------------------------------------------------------

    def _connect(self, stack: ExitStack) -> dict[Origin, RunNetwork]:
        """The network of each host: the same one for all, unless two engines were named."""
        contexts = {origin: self._scenario.hosts.context_of(origin) for origin in self._scenario.origins}
        leftovers.write_down(self._runtime.path, sorted(set(contexts.values())))
        engines: dict[str, Engine] = {}
        for context in dict.fromkeys(contexts.values()):
            engines[context] = connect(context)
            stack.callback(engines[context].close)
        by_id: dict[str, list[Origin]] = {}
        for origin, context in contexts.items():
            by_id.setdefault(engines[context].engine_id, []).append(origin)
        networks: dict[Origin, RunNetwork] = {}
        for number, origins in enumerate(by_id.values()):
            engine = engines[contexts[origins[0]]]
            self._images[engine.engine_id] = ensure(engine.client, self._history.note)
            network = RunNetwork(
                engine, self._run_id, alone=len(by_id) == 1, number=number, origins=origins,
                labels=labels.of_run(self._run_id, self._runtime.path), history=self._history,
            )  # fmt: skip
            stack.callback(network.remove)
            networks |= dict.fromkeys(origins, network)
        self._engines = {origin: engines[context] for origin, context in contexts.items()}
        return networks

    # -- hosts ---------------------------------------------------------------------------------

    def _start(self, stack: ExitStack, origin: Origin, networks: Mapping[Origin, RunNetwork]) -> DockerHost:
        network, engine = networks[origin], self._engines[origin]
        sharing, tls = self._share(origin, engine)
        stack.callback(sharing.close)
        self._sharings[origin] = sharing
        container = RunContainer.make(
            engine, self._images[engine.engine_id], self._name(origin),
            scenario=self._scenario, network=network.handle, address=network.addresses[origin],
            labels=self._labels(origin), mounts=sharing.mounts, ports=network.ports,
        )  # fmt: skip
        stack.callback(container.remove)
        sharing.fill(container)
        container.begin()
        sharing.open(container)
        self._history.note(
            "container_started", host=origin, container=container.name, address=container.address
        )
        others = [other for other in networks.values() if other is not network]
        reached_at = functools.partial(network.reached_at, origin, container, others[0] if others else None)
        host = self._begin_processes(stack, origin, container, tls, sharing.control)
        host.migration_address = reached_at()
        container.on_start = lambda: self._start_again(host, reached_at)
        stack.callback(self._end_processes, host, sharing)
        stack.callback(host.client.close)
        stack.callback(self._end_node, host)
        return host

    def _begin_processes(
        self, stack: ExitStack, origin: Origin, container: RunContainer, tls: PemFiles | None, control: str
    ) -> DockerHost:
        places = _places()
        agent = self._process(f"{origin}-agent", container, lambda again: agent_arguments(
            self._scenario, origin, places, standby=again or origin != "source"
        ))  # fmt: skip
        stack.callback(agent.join)
        node = self._process(f"{origin}-node", container, lambda _: node_arguments(
            self._scenario, origin, places, migration_address=f"{container.address}:{MIGRATION_PORT}",
            tls_dir=None if tls is None else PurePosixPath(TLS),
        ))  # fmt: skip
        client = NodeClient(origin, control, self._history)
        server_name = "" if tls is None else tls.server_name
        host = DockerHost(
            origin, node, agent, client, container, migration_address="", server_name=server_name
        )
        node.wait_until_ready = lambda: self._wait_until_serving(host)
        return host

    def _share(self, origin: Origin, engine: Engine) -> tuple[Sharing, PemFiles | None]:
        """Sockets, evidence and certificate of a host."""
        data = self._run_dir.node(origin)
        data.mkdir(mode=0o700)
        if origin == "source":
            write_workloads(self._scenario, data / "workloads.json")
        for kind in ("beats", "oracle"):
            self._run_dir.artefact(f"{origin}.{kind}").symlink_to(f"../nodes/{origin}/{kind}")
        tls = None if self._authority is None else self._authority.issue(SHORT_NAMES[origin])
        certificates = None if tls is None else tls.directory
        if engine.local:
            sockets = self._runtime.path / SHORT_NAMES[origin]
            return SharedDirectories(sockets, data, certificates), tls
        return CopiedVolumes(
            engine, self._name(origin), relay_path=self._runtime.socket(f"{SHORT_NAMES[origin]}.control"),
            data=data, tls=certificates, labels=self._labels(origin),
        ), tls  # fmt: skip

    def _name(self, origin: Origin) -> str:
        return f"ballast-{self._run_id}-{SHORT_NAMES[origin]}"

    def _labels(self, origin: Origin) -> dict[str, str]:
        return labels.of_run(self._run_id, self._runtime.path, origin)

    def _process(self, name: str, container: RunContainer, command: Any) -> ContainerProcess:
        user = inside_user()
        return ContainerProcess(
            name,
            container.handle,
            command=command,
            user=f"{user}:{user}",
            local=container.engine.local,
            log=self._run_dir.logs / f"{name}.log",
            on_start=self._started,
            on_exit=lambda process: self._exited(process, container),
        )

    def _wait_for(self, host: DockerHost) -> None:
        self._wait_until_serving(host)
        described = host.client.describe()
        self._history.note(
            "node_described",
            host=host.origin,
            pid=described.pid,
            roles=list(described.roles),
            facts=json.loads(described.facts_json or "{}"),
        )

    def _wait_until_serving(self, host: DockerHost) -> None:
        try:
            host.client.wait_until_serving(SERVE_S, still_worth_it=lambda: host.node.alive)
        except RunBrokenError as error:
            if host.node.alive:
                raise RunBrokenError(f"{error}: {host.node.last_words() or 'it said nothing'}") from None
            words = self._last_words(host.node, host.container) or "it said nothing"
            raise RunBrokenError(f"the {host.origin} node {host.node.status}: {words}") from None

    def _start_again(self, host: DockerHost, reached_at: Callable[[], str]) -> None:
        for process in (host.agent, host.node):
            process.restart()
        host.migration_address = reached_at()  # a published port is another one now

    # -- the end -------------------------------------------------------------------------------

    def _end_node(self, host: DockerHost) -> None:
        """Asks the node by its own service, so that it tells its last events before it goes."""
        for process in (host.node, host.agent):
            process.asked_to_end = True
        if not host.node.alive or self._interrupt.hurried:
            return
        try:
            host.container.thaw()
            host.node.resume()
            host.client.shutdown()
        except RunBrokenError as error:
            self._history.note("shutdown_refused", host=host.origin, reason=str(error))
            return
        host.node.wait(END_S)
        host.client.wait_for_last_event(HURRY_S)

    def _end_processes(self, host: DockerHost, sharing: Sharing) -> None:
        """All of the container ends at once; the agents wrote everything as it happened."""
        if host.container.alive:
            host.container.kill()
        for process in (host.node, host.agent):
            process.join()  # ends: the container was killed
        sharing.collect(host.container)

    def _started(self, process: ContainerProcess) -> None:
        self._history.note("process_started", process=process.name, pid=process.pid)

    def _exited(self, process: ContainerProcess, container: RunContainer) -> None:
        self._history.note(
            "process_ended",
            process=process.name,
            asked=process.asked_to_end,
            status=process.status,
            last_words="" if process.asked_to_end else self._last_words(process, container),
        )

    def _last_words(self, process: ContainerProcess, container: RunContainer) -> str:
        killed = process.status.endswith("SIGKILL")
        return (self._out_of_memory(container) if killed else "") or process.last_words()

    def _out_of_memory(self, container: RunContainer) -> str:
        """Whether the kernel killed it because the container's memory was spent: a fact, and the reason."""
        try:
            kills, limit_bytes = container.out_of_memory_kills(), container.limits().memory_bytes
        except RunBrokenError:  # the container itself is gone: then it was not the kernel
            return ""
        if not kills:
            return ""
        self._history.note("out_of_memory", container=container.name, kills=kills, limit_bytes=limit_bytes)
        return f"the container's memory of {format_bytes(limit_bytes)} was spent (hosts.memory)"


def _places() -> Places:
    """As the processes inside see them; the same in every container."""
    inside, data = PurePosixPath(INSIDE), PurePosixPath(DATA)
    return Places(
        vhost_socket=inside / "vhost.sock",
        agent_socket=inside / "agent.sock",
        control=f"unix:{inside / 'control.sock'}",
        node_dir=data,
        beats=data / "beats",
        oracle=data / "oracle",
        markers=data / "markers.json",
        workloads=data / "workloads.json",
    )
