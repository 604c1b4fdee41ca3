"""Hosts and their node processes: what outlives a process, and how a process that was started again finds its way.

Rule 1: a host keeps its agent, its journal and its device's state file; a node process has everything else.
Rule 2: a start takes the journal first, and not at all while somebody else holds it. Then what the journal says was
        unfinished is closed, then calls are served, then the guest is brought to where the journal says it must be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from migration import commands as do
from migration import events as told
from migration.identity import AttemptKey
from migration.pages import PAGE_BYTES
from migration.rounds import Limits
from source_node.packer import PackingOrder
from source_node.recovery import given_away_by, to_take_up, turned_back
from testbed.sim.balloon import SimBalloon
from testbed.sim.dest_host import SimIntake
from testbed.sim.errors import REFUSALS, AgentGone, AgentRefused, JournalFull, ViolationError
from testbed.sim.guest import Agent, State
from testbed.sim.journal import SimJournal
from testbed.sim.network import Refusal
from testbed.sim.orders import Order
from testbed.sim.plants import Plant
from testbed.sim.source_host import SourceRun
from testbed.sim.world import MS, Process

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from testbed.sim.network import Network, Pipe
    from testbed.sim.options import Options
    from testbed.sim.world import World

ATTACH_NS = 2 * MS
RETRY_NS = 20 * MS
BURNED_NS = 100 * MS


class Host:
    """What of a host survives its node process."""

    def __init__(self, world: World, name: str, options: Options, network: Network) -> None:
        self.world = world
        self.name = name
        self.options = options
        self.network = network
        self.journal = SimJournal(world.reach)
        self.device_file: dict[str, Any] = {}
        self.agent: Agent
        self.node: Node | None = None
        self.peer: Host
        self.on_failed_start: Callable[[], None] = lambda: None
        self.starts = 0
        self.incarnations = 0

    @property
    def up(self) -> bool:
        """Whether a node process lives and does not hang."""
        return self.node is not None and self.node.alive and not self.node.hung

    def start_node(self) -> Node | None:
        """Start a process; None when the journal is held."""
        holder = self.journal.holder
        two = self.world.plant is Plant.TWO_PROCESSES_ONE_JOURNAL
        if isinstance(holder, Node) and holder.alive and not two:
            self.world.say(self.name, "a second node process cannot start: the journal is held")
            self.world.coverage["fault second process refused"] += 1
            return None
        self.starts += 1
        node = self.node = Node(self)
        self.journal.holder = node
        node.start()
        return node

    def kill_node(self) -> None:
        """SIGKILL: what was not synced is lost, connections break."""
        node = self.node
        if node is None or not node.alive:
            return
        self.world.say(self.name, "the node process is killed")
        node.die()
        self.journal.lose_unsynced()
        self.journal.holder = None
        for pipe in tuple(self.network.pipes):
            if node in (pipe.source, pipe.server):
                pipe.broken("the peer's process ended")
        self.network.process_ended(node)


class Node(Process):
    """One node process."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.world, f"{host.name}.node{host.starts}")
        self.host = host
        self.network = host.network
        self.journal = host.journal
        self.stale_ram: np.ndarray[Any, np.dtype[np.uint64]] | None = None
        self.run: SourceRun | None = None
        self.serving = False
        self.attached = False  # to the agent; nobody is taken in before
        self.refuses = False  # every call: its certificate is another one than it should be
        self.writer_stuck = False  # the next wait for a page writer takes too long
        self.on_ended: Callable[[do.EndMigration], None] = lambda _: None
        self.balloon = SimBalloon(self.world, self, host.agent, host.device_file, host.options.pages)
        self.intake = SimIntake(self)
        self._burned: list[AttemptKey] = []

    @property
    def agent(self) -> Agent:
        """The local guest agent; it serves the node that connected last."""
        if self.host.node is not self:
            raise AgentGone("the agent serves another node process")
        return self.host.agent

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """In steps, each of which may be the last."""
        self.world.after(0, self._recover_journal, self)

    def _recover_journal(self) -> None:
        try:
            self._close_unfinished()
        except JournalFull as error:
            self.world.say(self.name, f"cannot start: {error}")
            self.host.kill_node()
            self.world.after(RETRY_NS, self.host.on_failed_start)
            return
        self.serving = True
        self.world.after(ATTACH_NS, self._attach, self)

    def _close_unfinished(self) -> None:
        for entry in self.journal.unfinished("source"):
            if entry.state != "COMMITTING":
                self.journal.move(entry.key, "source", {entry.state}, "ABORTED", detail="the node restarted")
                self._burned.append(entry.key)
        self.intake.recover_journal()

    def _attach(self) -> None:
        agent = self.host.agent
        if not agent.alive:
            return
        if agent.mute:
            self.world.after(ATTACH_NS, self._attach, self)
            return
        agent.on_ring_stopped = self.balloon.disconnect
        agent.on_ring_started = self.balloon.connect
        try:
            self._recover_guest()
            self.intake.recover_guest()
        except (AgentRefused, AgentGone) as error:
            self.world.say(self.name, f"guest unusable: {error}")
        self.attached = True
        if agent.state is State.RUNNING:
            self.balloon.connect()

    def _recover_guest(self) -> None:
        entries: Any = self.journal.entries("source")  # with the same fields as the real journal's
        agent, pending = self.agent, to_take_up(entries)
        if pending is not None and pending.digest is not None:
            order = Order(pending.key, told.Skip.NONE, Limits(), "stream", 0, False, 1, PackingOrder())
            if agent.guest is not None:
                self.run = SourceRun(self, order, self._ended)
                self.run.take_up(pending.digest)
        elif agent.hello() is not State.STANDBY and turned_back(entries, agent.epoch) is not None:
            if agent.state in {State.PAUSED, State.RUNNING}:
                agent.throttle(0)
            if agent.state is State.PAUSED:
                agent.resume(agent.epoch)
            self.balloon.hints_done()
        for key in self._burned:
            self._tell_burned(key)
        self._burned.clear()

    def _tell_burned(self, key: AttemptKey) -> None:
        self.peer_call(lambda intake: intake.abort(key, "the source restarted"), lambda _: None, BURNED_NS)

    def lost_agent(self) -> None:
        """The connection to the agent broke, or its process is gone."""
        self.balloon.disconnect()
        if self.run is not None and not self.run.over:
            self.run.post(told.HostFailed("the guest agent closed the link"))

    # -- the source role -----------------------------------------------------------------------

    def stand_by(self) -> bool:
        """Let go of a guest that was given away, as the operator asked; whether there is room now."""
        agent = self.host.agent
        if not (self.alive and self.serving and not self.hung and agent.alive) or agent.mute:
            return False
        if self.host.node is not self:
            return False
        if agent.state is State.STANDBY:
            return True
        entries: Any = self.journal.entries("source")
        given = given_away_by(entries, agent.epoch)
        under_way = self.run is not None and not self.run.over
        if given is None or given.state != "COMPLETED" or under_way or agent.state is not State.FROZEN:
            return False
        agent.stand_by()
        self.balloon.disconnect()
        self.run = None
        self.intake.stood_by()
        return True

    def can_migrate(self) -> bool:
        """Whether a migration may be asked for now."""
        idle = self.run is None or self.run.over
        ready = self.alive and not self.hung and self.serving
        agent = self.host.agent
        return ready and idle and agent.alive and not agent.mute and agent.state is State.RUNNING

    def migrate(self, key: AttemptKey, options: Options, *, rehearsal: bool, limits: Limits) -> None:
        """Begin an attempt."""
        order = Order(
            key,
            told.Skip(options.skip),
            limits,
            options.integrity,
            options.hint_wait_ms,
            rehearsal,
            options.streams,
            PackingOrder(options.compression, options.delta_cache_pages * PAGE_BYTES),
            options.handover_ms,
        )
        self.run = SourceRun(self, order, self._ended)
        self.run.start()

    def _ended(self, run: SourceRun, command: do.EndMigration) -> None:
        if run.shell.hints_asked and command.outcome != "completed" and not self.balloon.told_done:
            raise ViolationError(
                "the guest has its pages back", f"an attempt ended {command.outcome} without DONE"
            )
        self.world.say(self.name, f"migration ended: {command.outcome}: {command.reason}")
        self.world.coverage[f"outcome {command.outcome}"] += 1
        self.on_ended(command)

    # -- the peer ------------------------------------------------------------------------------

    def peer_call(
        self, serve: Callable[[SimIntake], Any], answered: Callable[[Any], None], timeout_ns: int
    ) -> Any:
        """Call the other host's Migration service."""
        peer = self.host.peer

        def server() -> Process | None:
            node = peer.node
            return node if node is not None and node.serving else None

        def served(process: Process) -> Any:
            assert isinstance(process, Node), "nodes serve calls"
            if process.refuses:
                return Refusal("permission denied")
            try:
                return serve(process.intake)
            except REFUSALS as error:
                process.world.say(process.name, f"refused: {error}")
                return Refusal(str(error))

        return self.network.call(self, self._between, server, served, answered, timeout_ns=timeout_ns)

    @property
    def _between(self) -> tuple[str, str]:
        return self.host.name, self.host.peer.name

    def peer_stream(self) -> Pipe:
        """A page stream to the other host."""
        return self.network.pipe(self, self._between, self._peer_accept)

    def _peer_accept(self, pipe: Pipe) -> None:
        node = self.host.peer.node
        if node is None or not node.alive or not node.serving:
            pipe.broken("connection refused")
            return
        pipe.server = node
        self.world.after(0, lambda: node.intake.pages(pipe), node)

    def next_incarnation(self) -> str:
        """A name for new memory."""
        self.host.incarnations += 1
        return f"{self.host.name}{self.host.incarnations}"
