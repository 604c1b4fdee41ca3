"""What a schedule does to a world, fault by fault, and how everything is made whole again.

Rule 1: a killed process is started again by its supervisor; a hung one goes on by itself, and only a lock keeps its
        replacement out meanwhile.
Rule 2: `heal` ends every fault there is; after it no schedule does anything any more.
Rule 3: every kind of `options.KINDS` has its method here; a kind's name says which host it hits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migration.dest_phases import DestPhase
from testbed.sim.guest import State
from testbed.sim.plants import Plant
from testbed.sim.world import MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.sim.node import Host, Node
    from testbed.sim.options import Fault
    from testbed.sim.simulation import Simulation

REPEATED_NS = 100 * MS
HOLD_NS = 40 * MS
WRITTEN_ALL_THE_SAME = 0.3
# The agent has said that it holds the image, and is not asked again before it must run it.
BEYOND_RECALL = frozenset({DestPhase.CONFIRMING, DestPhase.RECORDING_COMMITTED, DestPhase.STARTING})


class Faults:
    """The schedule of one world."""

    def __init__(self, simulation: Simulation) -> None:
        self.healed = False
        self._sim = simulation
        self._world = simulation.world
        self._network = simulation.network
        self._dice = simulation.world.dice("faults at work")
        self._kinds: dict[str, Callable[[Fault, Host], None]] = {
            "crash": self._crash,
            "kill": self._kill,
            "reset": lambda _fault, _host: self._network.reset(),
            "partition": lambda fault, _host: self._shut(fault, "a", "b"),
            "partition one way": lambda fault, _host: self._shut(fault, self._dice.choice(("a", "b"))),
            "lose": self._messages,
            "duplicate": self._messages,
            "delay": self._messages,
            "reorder": self._messages,
            "hang": lambda fault, host: self._hang(host, fault),
            "replace": lambda fault, host: self._hang(host, fault, replaced=True),
            "cancel": lambda _fault, _host: self._cancel(),
            "hold": lambda _fault, _host: None,  # whoever is at a point is held there, whatever the fault
            "timers": lambda _fault, _host: self._hurry(),
            "refuse streams": lambda _fault, _host: self._refuse_streams(),
            "refuse calls": lambda fault, _host: self._for_a_while(simulation.dest.node, "refuses", fault),
            "mute": lambda fault, host: self._for_a_while(host.agent, "mute", fault),
            "repeat": lambda fault, _host: self._repeat(fault.kind),
            "stick": lambda _fault, _host: self._stick(),
            "fill": self._fill_journal,
            "overtake": lambda _fault, _host: self._overtake(),
            "cut": self._cut_agent_link,
            "restart": self._restart_device,
        }

    def watch(self, host: Host) -> None:
        """A start that fails is tried again."""
        host.on_failed_start = lambda: self._start_again(host)

    def arm(self, fault: Fault) -> None:
        """Have it come when it is due."""
        if fault.at_ms is not None:
            self._world.after(int(fault.at_ms * MS), lambda: self._come(fault))
            return
        waiting = self._world.at_point.setdefault(fault.point, [])
        waiting.extend([lambda: False] * (fault.nth - 1 - len(waiting)))
        waiting.append(lambda: self._apply(fault))

    def heal(self) -> None:
        """No fault is left, and whoever was stopped goes on."""
        self.healed = True
        self._world.say("world", "every fault is healed")
        self._world.at_point.clear()
        self._network.heal()
        for host in self._sim.hosts:
            if not host.agent.alive:
                self._reboot(host)
            elif host.node is None or not host.node.alive:
                self._start_again(host)
            elif host.node.hung:
                self._wake(host, host.node)
            host.agent.mute = host.journal.full = False
            if host.node is not None:
                host.node.refuses = host.node.writer_stuck = False
            self._reconnect(host)

    def _come(self, fault: Fault) -> None:
        self._apply(fault)

    def _apply(self, fault: Fault) -> bool:
        if self.healed:
            return False
        self._world.say("fault", str(fault))
        self._world.coverage[f"fault {fault.kind}"] += 1
        self._world.hold_ns = int(fault.for_ms * MS) or HOLD_NS
        words = fault.kind.split()
        host = self._sim.source if "source" in words else self._sim.dest
        action = self._kinds.get(fault.kind) or self._kinds[words[0]]
        action(fault, host)
        return True

    def _later(self, fault: Fault, action: Callable[[], None]) -> None:
        self._world.after(int(fault.for_ms * MS), action)

    # -- processes -----------------------------------------------------------------------------

    def _crash(self, fault: Fault, host: Host) -> None:
        host.kill_node()
        self._later(fault, lambda: self._start_again(host))

    def _start_again(self, host: Host) -> None:
        if host.node is None or not host.node.alive:
            self._world.say(host.name, "the node is started again")
            self._sim.start_node(host)

    def _hang(self, host: Host, fault: Fault, *, replaced: bool = False) -> None:
        node = host.node
        if node is None or not node.alive or node.hung:
            return
        node.hung = True
        self._world.say(host.name, "the node hangs")
        if replaced:
            self._world.after(int(fault.for_ms * MS) // 3, lambda: self._replace(host))
        self._later(fault, lambda: self._wake(host, node))

    def _replace(self, host: Host) -> None:
        if host.node is not None and host.node.hung:
            self._sim.start_node(host)

    def _wake(self, host: Host, node: Node) -> None:
        if not node.alive or not node.hung:
            return
        alone = node is host.node or self._world.plant is Plant.TWO_PROCESSES_ONE_JOURNAL
        assert alone, "only the journal's lock keeps them apart"
        self._world.say(host.name, "the hung node goes on")
        node.wake()

    def _kill(self, fault: Fault, host: Host) -> None:
        self._later(fault, lambda: self._reboot(host))
        agent = host.agent
        if not agent.alive:
            return
        entry = host.journal.newest("dest")
        promised = agent.state is State.RESTORED and entry is not None and entry.state == "COMMITTED"
        if host.node is not None and host.node.intake.machine.phase in BEYOND_RECALL:
            promised = True
        if agent.state in (State.RUNNING, State.PAUSED) or promised:
            self._sim.lost_is_possible = True
        self._world.say(host.name, f"the guest agent is killed, {agent.state.value}")
        agent.die()
        if host.node is not None and host.node.alive:
            node = host.node
            self._world.after(MS, node.lost_agent, node)

    def _reboot(self, host: Host) -> None:
        """An agent that died comes back empty, and its node with it."""
        if not host.agent.alive:
            host.kill_node()
            self._sim.new_agent(host)
            self._sim.start_node(host)

    # -- the link ------------------------------------------------------------------------------

    def _shut(self, fault: Fault, *ways: str) -> None:
        self._network.shut(*ways)
        self._later(fault, lambda: self._open(*ways))

    def _open(self, *ways: str) -> None:
        if not self.healed:
            self._network.open(*ways)

    def _messages(self, fault: Fault, _host: Host) -> None:
        word = fault.kind.split()[0]
        self._network.shares[word] = fault.amount
        self._later(fault, lambda: self._network.shares.update({word: 0.0}))

    def _refuse_streams(self) -> None:
        for pipe in tuple(self._network.pipes):
            pipe.close("the destination refuses", refused=True)

    def _repeat(self, kind: str) -> None:
        """A peer says again what was said of the attempt at hand, or gives it up though its source did not."""
        node, giver = self._sim.dest.node, self._sim.source.node
        if node is None or giver is None or not giver.alive or node.intake.machine.key is None:
            return
        key, prepare = node.intake.machine.key, node.intake.prepared
        if kind == "repeat Abort":
            giver.peer_call(lambda intake: intake.abort(key, "said again"), lambda _: None, REPEATED_NS)
        elif prepare is not None:
            giver.peer_call(lambda intake: intake.prepare(prepare), lambda _: None, REPEATED_NS)

    # -- the hosts -----------------------------------------------------------------------------

    def _cancel(self) -> None:
        node = self._sim.source.node
        if node is not None and node.run is not None:
            node.run.cancel("cancelled by the operator")

    def _hurry(self) -> None:
        node = self._sim.source.node
        if node is not None and node.run is not None:
            node.run.hurry()

    def _fill_journal(self, fault: Fault, host: Host) -> None:
        journal = host.journal
        journal.full = True
        journal.written_when_full = lambda: self._dice.random() < WRITTEN_ALL_THE_SAME
        self._later(fault, lambda: setattr(journal, "full", False))

    def _overtake(self) -> None:
        node = self._sim.source.node
        if node is not None and node.run is not None:
            node.run.shell.news_overtaken = True

    def _for_a_while(self, what: object, flag: str, fault: Fault) -> None:
        if what is not None:
            setattr(what, flag, True)
            self._later(fault, lambda: setattr(what, flag, False))

    def _stick(self) -> None:
        if self._sim.dest.node is not None:
            self._sim.dest.node.writer_stuck = True

    def _cut_agent_link(self, fault: Fault, host: Host) -> None:
        if host.node is not None and host.node.alive:
            self._world.after(0, host.node.lost_agent, host.node)
            self._later(fault, lambda: self._reconnect(host))

    def _restart_device(self, fault: Fault, _host: Host) -> None:
        host = self._sim.source
        if host.node is not None:
            host.node.balloon.disconnect()
        self._later(fault, lambda: self._reconnect(host))

    def _reconnect(self, host: Host) -> None:
        node = host.node
        if node is not None and node.alive and host.agent.alive and host.agent.state is State.RUNNING:
            node.balloon.connect()
