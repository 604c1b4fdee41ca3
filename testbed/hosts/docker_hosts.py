"""Hosts as containers of a Docker engine, on a network that the run makes for itself.

Rule 1: a host is one container with a node process and a guest agent; directories and sockets of this machine are
        shared with it, so that its control channel is a unix socket that no fault of the network touches.
Rule 2: everything that is made carries the run's labels and is removed when the run ends, in reverse; what a kill
        of this process leaves is found by those labels (`ballast clean`).
Rule 3: a process that ended by itself is a fact in the history, and so is memory that was spent.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Self

from docker.errors import APIError
from docker.types import IPAMConfig, IPAMPool

from testbed.certificates import make_run_authority
from testbed.errors import RunBrokenError
from testbed.hosts import labels, leftovers, subnets
from testbed.hosts.command_lines import Places, agent_arguments, node_arguments, write_workloads
from testbed.hosts.container import DATA, TLS, RunContainer, inside_user
from testbed.hosts.container_process import INSIDE, ContainerProcess
from testbed.hosts.engine import Engine, connect, innermost, told
from testbed.hosts.image import ensure
from testbed.hosts.local import END_S, HURRY_S, SERVE_S
from testbed.hosts.port import SHORT_NAMES, origins_of
from testbed.node_client import NodeClient
from testbed.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from testbed.certificates import PemFiles
    from testbed.history import History, Origin
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.run_dir import RunDir
    from testbed.scenario import Scenario

MIGRATION_PORT: Final = 7601
SUBNET_TRIES: Final = 16
FIRST_HOST: Final = 2  # of a subnet's addresses; the engine's bridge has the one before


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
        """Nothing to do: the containers write into directories of the run."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            engine = connect(self._scenario.hosts.context_source)
            stack.callback(engine.close)
            leftovers.write_down(self._runtime.path, [self._scenario.hosts.context_source])
            image = ensure(engine.client, self._history.note)
            network, addresses = self._make_network(engine)
            stack.callback(self._remove_network, network)
            stack.callback(self._own_again)
            for origin, address in reversed(addresses.items()):
                self.hosts[origin] = self._start(
                    stack, origin, engine=engine, image=image, network=network, address=address
                )
            for host in self.hosts.values():
                self._wait_for(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- network -------------------------------------------------------------------------------

    def _make_network(self, engine: Engine) -> tuple[Any, dict[Origin, str]]:
        """An internal bridge; the engine has the last word on which subnets are free."""
        taken = [*subnets.of_engine(engine.client.networks.list()), *subnets.of_routes()]
        refusals: list[str] = []
        for subnet, _ in zip(subnets.candidates(taken, self._run_id), range(SUBNET_TRIES), strict=False):
            pool = IPAMPool(subnet=str(subnet), gateway=str(subnet[1]))
            try:
                network = engine.client.networks.create(
                    f"ballast-{self._run_id}",
                    driver="bridge",
                    internal=True,
                    labels=labels.of_run(self._run_id, self._runtime.path),
                    ipam=IPAMConfig(pool_configs=[pool]),
                    options={"com.docker.network.bridge.name": f"blst-{self._run_id}"},
                )
            except APIError as error:  # another run was faster
                refusals.append(innermost(error))
                continue
            self._history.note("network_made", network=network.name, subnet=str(subnet))
            origins = origins_of(self._scenario)
            return network, {origin: str(subnet[FIRST_HOST + index]) for index, origin in enumerate(origins)}
        raise RunBrokenError(
            f"the run's network cannot be made: {'; '.join(refusals) or 'no subnet is free'}"
        )

    def _remove_network(self, network: Any) -> None:
        with told(f"the network {network.name} cannot be removed"):
            network.remove()

    # -- hosts ---------------------------------------------------------------------------------

    def _start(
        self, stack: ExitStack, origin: Origin, *, engine: Engine, image: str, network: Any, address: str
    ) -> DockerHost:
        mounts, tls = self._directories(origin)
        container = RunContainer.run(
            engine, image, f"ballast-{self._run_id}-{SHORT_NAMES[origin]}",
            scenario=self._scenario, network=network, address=address,
            labels=labels.of_run(self._run_id, self._runtime.path, origin),
            mounts=mounts, ports={},
        )  # fmt: skip
        stack.callback(container.remove)
        self._history.note("container_started", host=origin, container=container.name, address=address)
        client = NodeClient(
            origin, f"unix:{self._runtime.path / SHORT_NAMES[origin] / 'control.sock'}", self._history
        )
        migration_address = f"{address}:{MIGRATION_PORT}"
        places = _places()
        agent = self._process(f"{origin}-agent", container, lambda again: agent_arguments(
            self._scenario, origin, places, standby=again or origin != "source"
        ))  # fmt: skip
        node = self._process(f"{origin}-node", container, lambda _: node_arguments(
            self._scenario, origin, places, migration_address=migration_address,
            tls_dir=None if tls is None else PurePosixPath(TLS),
        ))  # fmt: skip
        host = DockerHost(
            origin, node, agent, client, container, migration_address,
            server_name="" if tls is None else tls.server_name,
        )  # fmt: skip
        node.wait_until_ready = lambda: self._wait_until_serving(host)
        container.on_start = lambda: self._start_again(host)
        stack.callback(self._end_processes, host)
        stack.callback(client.close)
        stack.callback(self._end_node, host)
        return host

    def _directories(self, origin: Origin) -> tuple[dict[Path, str], PemFiles | None]:
        """What the container shares with this machine, sockets and evidence, and its certificate."""
        shared = self._runtime.path / SHORT_NAMES[origin]
        data = self._run_dir.node(origin)
        for path in (shared, data):
            path.mkdir(mode=0o700)
        if origin == "source":
            write_workloads(self._scenario, data / "workloads.json")
        for kind in ("beats", "oracle"):
            self._run_dir.artefact(f"{origin}.{kind}").symlink_to(f"../nodes/{origin}/{kind}")
        mounts = {shared: INSIDE, data: DATA}
        tls = None if self._authority is None else self._authority.issue(SHORT_NAMES[origin])
        if tls is not None:
            mounts[tls.directory] = TLS
        for path in [*mounts, *(file for directory in mounts for file in directory.iterdir())]:
            _give(path, inside_user())
        return mounts, tls

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
            raise RunBrokenError(f"{error}: {host.node.last_words() or 'it said nothing'}") from None

    def _start_again(self, host: DockerHost) -> None:
        for process in (host.agent, host.node):
            process.restart()

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

    def _end_processes(self, host: DockerHost) -> None:
        """All of the container ends at once; the agents wrote everything as it happened."""
        if host.container.alive:
            host.container.kill()
        for process in (host.node, host.agent):
            process.join()

    def _started(self, process: ContainerProcess) -> None:
        self._history.note("process_started", process=process.name, pid=process.pid)

    def _exited(self, process: ContainerProcess, container: RunContainer) -> None:
        words = "" if process.asked_to_end else process.last_words()
        if not process.asked_to_end and process.status.endswith("SIGKILL"):
            words = self._out_of_memory(container) or words
        self._history.note(
            "process_ended",
            process=process.name,
            asked=process.asked_to_end,
            status=process.status,
            last_words=words,
        )

    def _out_of_memory(self, container: RunContainer) -> str:
        """Whether the kernel killed it because the container's memory was spent: a fact, and the reason."""
        try:
            kills, (limit_bytes, _) = container.out_of_memory_kills(), container.limits()
        except RunBrokenError:  # the container itself is gone: then it was not the kernel
            return ""
        if not kills:
            return ""
        self._history.note("out_of_memory", container=container.name, kills=kills, limit_bytes=limit_bytes)
        return f"the container's memory of {format_bytes(limit_bytes)} was spent (hosts.memory)"

    def _own_again(self) -> None:
        """What the containers wrote belongs to the user of the run afterwards."""
        for origin in self.hosts:
            directory = self._run_dir.node(origin)
            for path in (directory, *directory.rglob("*")):
                _give(path, os.getuid())


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


def _give(path: Path, user: int) -> None:
    if os.getuid() == 0 and not path.is_symlink():
        os.chown(path, user, user)
