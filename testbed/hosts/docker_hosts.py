"""Hosts as containers of a Docker engine, on a network that the run makes for itself.

Rule 1: a host is one container with a node process and a guest agent. Its control channel is no network: a unix
        socket that is shared with this machine, or the engine's own connection (sharing.py).
Rule 2: everything that is made carries the run's labels and is removed when the run ends, in reverse; what a kill
        of this process leaves is found by those labels (`ballast clean`).
Rule 3: a process that ended by itself is a fact in the history, and so is memory that was spent.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from testbed.errors import RunBrokenError
from testbed.host_handles import SHORT_NAMES
from testbed.hosts import labels, leftovers
from testbed.hosts.command_lines import Places, agent_arguments, node_arguments, write_workloads
from testbed.hosts.container import DATA, TLS, RunContainer, inside_user
from testbed.hosts.container_process import INSIDE, ContainerProcess
from testbed.hosts.docker_network import MIGRATION_PORT, RunNetwork
from testbed.hosts.engine import Engine, connect
from testbed.hosts.image import ensure
from testbed.hosts.run_hosts import SERVE_S, RunHosts
from testbed.hosts.sharing import CopiedVolumes, SharedDirectories, Sharing
from testbed.node_client import NodeClient
from testbed.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testbed.history import Origin
    from testbed.hosts.certificates import PemFiles


@dataclass(slots=True)
class DockerHost:
    """One host's container and its processes."""

    origin: Origin
    node: ContainerProcess
    agent: ContainerProcess
    client: NodeClient
    container: RunContainer
    sharing: Sharing
    server_name: str  # of its certificate; "": plain text
    migration_address: str = ""

    @property
    def network_pid(self) -> int | None:
        """The container's first process: it lives as long as the network namespace."""
        return self.container.pid or None


@dataclass(frozen=True, slots=True)
class Site:
    """Where a container is made."""

    engine: Engine
    image: str
    network: RunNetwork


class DockerHosts(RunHosts[DockerHost]):
    """Of a run, each on the engine that the scenario names for it."""

    def collect(self) -> None:
        """Brings what the agents have written so far into the run directory."""
        for host in self.hosts.values():
            host.sharing.collect(host.container)

    def _begin(self, stack: ExitStack) -> None:
        sites = self._connect(stack)
        for origin in reversed(self._scenario.origins):
            self.hosts[origin] = self._start(stack, origin, sites)
        for host in self.hosts.values():
            self._wait_until_serving(host)
            self._describe(host.client)

    # -- engines and networks ------------------------------------------------------------------

    def _connect(self, stack: ExitStack) -> dict[Origin, Site]:
        """The site of each host: one network for all, unless two engines were named."""
        contexts = {origin: self._scenario.hosts.context_of(origin) for origin in self._scenario.origins}
        leftovers.write_down(self._runtime.path, sorted(set(contexts.values())))
        engines: dict[str, Engine] = {}
        for context in dict.fromkeys(contexts.values()):
            engines[context] = connect(context)
            stack.callback(engines[context].close)
        by_id: dict[str, list[Origin]] = {}
        for origin, context in contexts.items():
            by_id.setdefault(engines[context].engine_id, []).append(origin)
        sites: dict[Origin, Site] = {}
        for number, origins in enumerate(by_id.values()):
            engine = engines[contexts[origins[0]]]
            image = ensure(engine.client, self._history.note)
            network = RunNetwork(
                engine, self._run_id, alone=len(by_id) == 1, number=number, origins=origins,
                labels=labels.of_run(self._run_id, self._runtime.path), history=self._history,
            )  # fmt: skip
            stack.callback(network.remove)
            sites |= {origin: Site(engines[contexts[origin]], image, network) for origin in origins}
        return sites

    # -- hosts ---------------------------------------------------------------------------------

    def _start(self, stack: ExitStack, origin: Origin, sites: Mapping[Origin, Site]) -> DockerHost:
        site, network = sites[origin], sites[origin].network
        sharing, tls = self._share(origin, site.engine)
        stack.callback(sharing.close)
        container = RunContainer.make(
            site.engine, site.image, self._name(origin),
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
        other = next((other.network for other in sites.values() if other.network is not network), None)
        reached_at = functools.partial(network.reached_at, origin, container, other)
        host = self._begin_processes(stack, origin, container, sharing, tls)
        host.migration_address = reached_at()
        container.on_start = lambda: self._start_again(host, reached_at)
        stack.callback(self._end_processes, host)
        stack.callback(host.client.close)
        stack.callback(self._end_node, host)
        return host

    def _begin_processes(
        self,
        stack: ExitStack,
        origin: Origin,
        container: RunContainer,
        sharing: Sharing,
        tls: PemFiles | None,
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
        client = NodeClient(origin, sharing.control, self._history)
        server_name = "" if tls is None else tls.server_name
        host = DockerHost(origin, node, agent, client, container, sharing, server_name)
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
        tls = None if self.authority is None else self.authority.issue(SHORT_NAMES[origin])
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
        for process in (host.node, host.agent):
            process.asked_to_end = True
        if not host.node.alive or self._interrupt.hurried:
            return

        def wake() -> None:
            host.container.thaw()
            host.node.resume()

        self._shut_down(host.client, wake=wake, wait=host.node.wait)

    def _end_processes(self, host: DockerHost) -> None:
        """All of the container ends at once; the agents wrote everything as it happened."""
        if host.container.alive:
            host.container.kill()
        for process in (host.node, host.agent):
            process.join()  # ends: the container was killed
        host.sharing.collect(host.container)

    def _started(self, process: ContainerProcess) -> None:
        self._history.note("process_started", process=process.name, pid=process.pid)

    def _exited(self, process: ContainerProcess, container: RunContainer) -> None:
        self._note_end(process, lambda: self._last_words(process, container))

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
