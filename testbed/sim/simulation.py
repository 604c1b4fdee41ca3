"""One seed: two hosts, a guest, an operator who wants it moved, and a schedule of faults; judged at every step.

Rule 1: the operator asks, asks again after a failure, and at last, when every fault is healed, once more without
        any limit: that attempt must succeed wherever there is a guest.
Rule 2: a killed process is started again by its supervisor; a hung one goes on by itself.
Rule 3: everything follows from the seed and the schedule; a violation ends the world.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from migration.convergence import ThrottleSteps
from migration.errors import ProtocolError
from migration.identity import AttemptKey
from migration.rounds import Limits
from testbed.sim import invariants
from testbed.sim.errors import JournalRefused, ViolationError
from testbed.sim.faults import Faults
from testbed.sim.guest import Agent, Guest, State
from testbed.sim.guest_memory import HELD, Truth
from testbed.sim.network import Network
from testbed.sim.node import Host
from testbed.sim.options import ACTIVE_MS, Options, draw
from testbed.sim.plants import Plant
from testbed.sim.world import MS, World
from virtio.errors import VirtioError

if TYPE_CHECKING:
    from migration import commands as do

HEAL_MS = ACTIVE_MS + 300
SETTLE_MS = 12_000  # the slowest honest way: deadlines, silence and retries one after the other
FINAL_MS = 8_000
RELEASE_MS = 400_000  # a slow driver looks only now and then
ATTEMPTS_MAX = 4
FINAL_ATTEMPTS_MAX = 3  # what an earlier attempt left at the destination may have to be told first
QUIET_NS = 400 * MS
BALLOON_BUSY_MS, BALLOON_IDLE_MS = (2, 24), (10, 160)  # between two sizes that the operator wants


@dataclass(slots=True)
class Outcome:
    """What became of a world."""

    seed: int
    steps: int
    coverage: Counter[str]
    violation: str = ""
    options: Options = field(default_factory=Options)
    transcript: list[str] = field(default_factory=list)


class Simulation:
    """One world from its beginning to its judgement."""

    def __init__(self, seed: int, options: Options, plant: Plant, *, transcript: bool = False) -> None:
        world = self.world = World(seed, plant, transcript=transcript)
        self.options = options
        self.truth = Truth(options.pages)
        self.network = Network(world, options)
        self.source = Host(world, "a", options, self.network)  # of the leg under way
        self.dest = Host(world, "b", options, self.network)
        self.hosts = [self.source, self.dest]
        self.source.peer, self.dest.peer = self.dest, self.source
        self.leg = 1
        self.lost_is_possible = False
        self.attempts = 0
        self.rehearse = options.rehearsal
        self._epoch = 0
        self._dice = world.dice("operator")
        self._operator = world.dice("operator of the balloon")
        self.faults = Faults(self)
        self._last_outcome = ""
        self._final_attempts = 0
        world.guest_pause_ns = self._guest_pause_ns
        for host in (self.source, self.dest):
            self.new_agent(host)

    def new_agent(self, host: Host) -> None:
        """An agent process without a guest."""
        agent = host.agent = Agent(self.world, f"{host.name}.agent", self.options, self.truth)
        agent.running_changed = lambda: self._owner_changed(agent)

    def _guest_pause_ns(self) -> int:
        """Between two slices of the guest: short while a migration goes on, long when nothing ever will."""
        node = self.source.node
        if node is not None and node.run is not None and not node.run.over:
            waits = node.run.machine.phase.name in {"COMMITTING", "PREPARING"}
            return 8 * MS if waits else 3 * MS
        return QUIET_NS if self.faults.healed else 8 * MS

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Everything; never raises for what the world did."""
        violation = ""
        try:
            self._run()
        except ViolationError as error:
            violation = str(error)
        except (ProtocolError, VirtioError, JournalRefused, AssertionError) as error:
            violation = f"a machine failed: {type(error).__name__}: {error}"
        world = self.world
        if violation:
            world.say("world", f"VIOLATION {violation}")
        return Outcome(
            world.seed, world.steps, world.coverage, violation, self.options, world.transcript or []
        )

    def _run(self) -> None:
        world = self.world
        self.source.agent.boot()
        for host in self.hosts:
            self.faults.watch(host)
            self.start_node(host)
        world.after(self._dice.randrange(4, 12) * MS, self._ask)
        if self.options.balloon:
            world.after(self._operator.randrange(*BALLOON_BUSY_MS) * MS, self._inflate)
        for fault in self.options.faults:
            self.faults.arm(fault)
        world.run_until(HEAL_MS * MS, lambda: False)
        self.faults.heal()
        world.run_until(world.now_ns + SETTLE_MS * MS, self._settled)
        if not self._settled():
            raise ViolationError("ends within a bound", self._standing())
        self._finish()

    def _finish(self) -> None:
        world = self.world
        owner = self._owner()
        if owner is self.source:
            world.run_until(world.now_ns + FINAL_MS * MS, self._final_attempt_over)
            owner = self._owner()
            if owner is not self.dest and owner is not None:
                raise ViolationError(
                    "a new attempt succeeds", f"it ended {self._last_outcome or 'never'}; {self._standing()}"
                )
        if owner is None:
            if not self.lost_is_possible:
                raise ViolationError("exactly one owner", self._standing())
            return
        guest = owner.agent.guest
        assert guest is not None, "an owner has a guest"

        def given_back() -> bool:
            return not (guest.kinds == HELD).any()

        world.run_until(world.now_ns + 100 * MS, lambda: False)
        world.run_until(world.now_ns + RELEASE_MS * MS, given_back)
        invariants.hints_given_back(owner)
        self._deflate(owner, guest)
        invariants.memory_is_whole(owner.agent, self.truth)
        world.run_until(world.now_ns + 4_000 * MS, lambda: not (self.network.calls or self.network.pipes))
        invariants.nothing_is_left(self.hosts)

    def _deflate(self, owner: Host, guest: Guest) -> None:
        """At the end the guest gets back what its balloon holds, wherever it was inflated."""
        node, world = owner.node, self.world
        assert node is not None, "a host that owns a guest has a node"
        if not self.options.balloon or not self.options.hint_diligence or self.options.guest_lies:
            return  # there is none, or nobody who deflates it, or nobody who counts right
        node.balloon.set_num_pages(0)
        world.run_until(world.now_ns + RELEASE_MS * MS, lambda: invariants.balloon_is_empty(node, guest))
        if not invariants.balloon_is_empty(node, guest):
            raise ViolationError("the balloon goes on", f"{guest.driver.balloon.actual} pages stay in it")

    def _final_attempt_over(self) -> bool:
        node = self.source.node
        if node is not None and node.can_migrate() and self._owner() is self.source:
            if self._final_attempts == FINAL_ATTEMPTS_MAX:
                return True
            self._final_attempts += 1
            self._migrate(final=True)
        return self._owner() is not self.source and self._settled()

    # -- the operator --------------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask for a migration if none is under way and attempts are left; look again in a moment."""
        if self.faults.healed or self.leg > self.options.legs:
            return
        if self._owner() is self.dest:
            self._next_leg()
        node = self.source.node
        if node is not None and node.can_migrate() and self.attempts < ATTEMPTS_MAX * self.leg:
            self._migrate(final=False)
        self.world.after(self._dice.randrange(5, 40) * MS, self._ask)

    def _inflate(self) -> None:
        """Want a balloon of another size, most often while the guest is on its way; again in a moment."""
        if self.faults.healed or self.leg > self.options.legs:
            return
        node, pages = self.source.node, int(self.options.pages * self.options.balloon)
        migrates = node is not None and node.run is not None and not node.run.over
        if node is not None and self.source.up and node.balloon.ready:
            node.balloon.set_num_pages(self._operator.randrange(pages))
        pause_ms = BALLOON_BUSY_MS if migrates else BALLOON_IDLE_MS
        self.world.after(self._operator.randrange(*pause_ms) * MS, self._inflate)

    def _next_leg(self) -> None:
        """The guest arrived: where it came from is room again, and from here it goes back."""
        left = self.source.node
        if self.leg == self.options.legs:
            self.leg += 1
        elif left is not None and left.stand_by():
            self.leg += 1
            self.source, self.dest = self.dest, self.source

    def _migrate(self, *, final: bool) -> None:
        node = self.source.node
        assert node is not None, "who can migrate is there"
        self.attempts += 1
        key = AttemptKey(f"leg{self.leg}", self.attempts, self.source.agent.epoch)
        rehearsal, self.rehearse = self.rehearse and not final, False
        limits = Limits(rounds_max=3, timeout_ms=math.inf) if final else self._limits()
        self.world.say("operator", f"asks for attempt {self.attempts}{' (a rehearsal)' if rehearsal else ''}")
        node.on_ended = self._ended
        node.migrate(key, self.options, rehearsal=rehearsal, limits=limits)

    def _limits(self) -> Limits:
        options = self.options
        return Limits(
            rounds_max=options.rounds_max,
            downtime_limit_ms=options.downtime_limit_ms,
            timeout_ms=options.timeout_ms,
            on_rounds_max=options.on_rounds_max,  # type: ignore[arg-type]
            on_timeout=options.on_timeout,  # type: ignore[arg-type]
            on_stall=options.on_stall,  # type: ignore[arg-type]
            throttle=ThrottleSteps(20, 30, 80) if options.on_stall == "throttle" else None,
            bandwidth=None,
            link_timeout_ms=options.link_timeout_ms,
            link_timeout_paused_ms=options.link_timeout_paused_ms,
        )

    def _ended(self, command: do.EndMigration) -> None:
        self._last_outcome = command.outcome

    def start_node(self, host: Host) -> None:
        """A node process, if the journal is free."""
        node = host.start_node()
        if node is not None:
            node.on_ended = self._ended

    # -- judging -------------------------------------------------------------------------------

    def _owner_changed(self, agent: Agent) -> None:
        agents = [host.agent for host in self.hosts]
        invariants.one_owner(agents)
        if agent.state is State.RUNNING and agent.epoch > self._epoch:
            self._epoch = agent.epoch
            if agent.epoch > 1:
                here, there = sorted(self.hosts, key=lambda host: host.agent is agent)
                invariants.handed_over(here.agent, agent, self.truth)
                invariants.balloon_arrived(here, there, self.truth)

    def _owner(self) -> Host | None:
        for host in self.hosts:
            if host.agent.alive and host.agent.state is State.RUNNING:
                return host
        return None

    def _settled(self) -> bool:
        for host in self.hosts:
            node = host.node
            if node is None or not node.attached or (node.run is not None and not node.run.over):
                return False
        return self._owner() is not None or self.lost_is_possible

    def _standing(self) -> str:
        """How everything stands, in one line."""
        parts = []
        for host in self.hosts:
            node = host.node
            run = "" if node is None or node.run is None else f", source {node.run.machine.phase.name}"
            dest = "" if node is None else f", dest {node.intake.machine.phase.name}"
            parts.append(f"{host.name}: guest {host.agent.state.value}{run}{dest}")
        return "; ".join(parts)


def simulate(
    seed: int, plant: Plant = Plant.NONE, *, options: Options | None = None, transcript: bool = False
) -> Outcome:
    """The world of a seed, or the same seed's under other options."""
    return Simulation(seed, options or draw(seed), plant, transcript=transcript).run()
