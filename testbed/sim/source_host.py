"""The source role of a simulated node: source_node/migration_run.py in virtual time.

Rule 1: one thing at a time, with a moment between two orders: the guest lives on between them, and what others tell
        may come in between.
Rule 2: at a point where a fault comes the run is held until the fault is felt.
Rule 3: a wish to cancel goes before the facts that wait; one that is effective is the end of the attempt here.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from migration import commands as do
from migration import events as told
from migration.errors import RemoteProtocolError
from migration.source_machine import SourceMachine
from migration.source_phases import SourcePhase
from testbed.sim import points
from testbed.sim.errors import AgentGone, AgentRefused, DeviceNotReady, ViolationError
from testbed.sim.orders import Order, in_a_line
from testbed.sim.plants import Plant
from testbed.sim.source_shell import SourceShell
from testbed.sim.world import MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.sim.node import Node

STEP_NS = 15_000
SLOW_STEPS, SLOW_STEP_NS = 0.05, 4 * MS
HOLD_NS_MAX = 40 * MS
PHASE_POINTS = frozenset(points.PHASES)
EVENTS_MAX = 64  # of a machine's queue: hint reports come slower than they are taken


class SourceRun:
    """One attempt. `ended` is told once, with the outcome."""

    def __init__(self, node: Node, order: Order, ended: Callable[[SourceRun, do.EndMigration], None]) -> None:
        self.node = node
        self.order = order
        self.machine = SourceMachine(batch_pages=node.host.options.batch_pages)
        self.over = False
        self.blocked = False
        self.dice = node.world.dice(f"steps of {node.name}")
        self.shell = SourceShell(self, node, order)
        self._ended = ended
        self._events: deque[told.SourceEvent] = deque()
        self._first: deque[told.SourceEvent] = deque()
        self._wishes: deque[str] = deque()
        self._cancelled = False
        self._commands: deque[do.SourceCommand] = deque()
        self._timers: dict[told.Timer, object] = {}
        self._stepping = False

    # -- from outside --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        order = self.order
        self._first.append(
            told.MigrationRequested(
                order.key,
                self.shell.guest.ram.pages,
                order.skip,
                order.limits,
                order.hint_wait_ms,
                order.rehearsal,
            )
        )
        self.go_on()

    def take_up(self, digest: int) -> None:
        """An attempt that was COMMITTING when the process ended."""
        self._first.append(told.CommitPending(self.order.key, digest))
        self.go_on()

    def cancel(self, reason: str) -> None:
        """The wish."""
        self._wishes.append(reason)
        self.go_on()

    def post(self, event: told.SourceEvent) -> None:
        """Queue a fact."""
        if self.over:
            return
        self._events.append(event)
        if len(self._events) > EVENTS_MAX:
            raise ViolationError("bounded", f"{len(self._events)} events wait for the source machine")
        self.go_on()

    # -- the loop ------------------------------------------------------------------------------

    def go_on(self) -> None:
        """There is something to do."""
        if not self._stepping and not self.over:
            self._stepping = True
            slow = self.dice.random() < SLOW_STEPS  # the thread had to wait for a processor
            delay_ns = self.dice.randrange(STEP_NS, SLOW_STEP_NS) if slow else STEP_NS
            self.node.world.after(delay_ns, self._step, self.node)

    def _step(self) -> None:
        self._stepping = False
        if self.over or self.blocked:
            return
        if self._commands:
            self._execute(self._commands.popleft())
        elif self._first:
            self._handle(self._first.popleft())
        elif self._wishes:
            self._cancelled |= self.machine.reversible
            self._handle(told.CancelRequested(self._wishes.popleft()))
        elif self._events:
            self._handle(self._events.popleft())
        else:
            return
        if not self.over:
            self.go_on()

    def _handle(self, event: told.SourceEvent) -> None:
        world, machine = self.node.world, self.machine
        before = machine.phase
        self._commands.extend(machine.handle(event, world.now_ns))
        entered = machine.phase is not before and points.phase(machine.phase) in PHASE_POINTS
        if entered and world.reach(points.phase(machine.phase)):
            self.blocked = True
            world.after(self._hold_ns(), self._unhold, self.node)
        world.coverage[f"source {before.name} {type(event).__name__} {machine.phase.name}"] += 1
        if world.transcript is not None:
            world.say(self.node.name, f"{in_a_line(event)}: {before.name} -> {machine.phase.name}")
        lost = isinstance(event, told.LinkLost | told.PeerLost)
        if world.plant is Plant.RESUME_AFTER_COMMITTING and lost and machine.phase is SourcePhase.COMMITTING:
            self.node.agent.resume(self.order.key.guest_epoch)

    def _execute(self, command: do.SourceCommand) -> None:
        world, seen = self.node.world, type(command) not in points.UNSEEN
        if seen and world.reach(points.before("source", type(command))):
            # Held until the fault is in force: what it brings may be told before what the order brings.
            self.blocked = True
            self.node.world.after(self._hold_ns(), lambda: self._let_go(command), self.node)
            return
        self.carry_out(command, seen=seen)

    def _hold_ns(self) -> int:
        return self.dice.randrange(1, min(HOLD_NS_MAX, self.node.world.hold_ns) + 1)

    def _unhold(self) -> None:
        self.blocked = False
        self.go_on()

    def _let_go(self, command: do.SourceCommand) -> None:
        self.blocked = False
        self.carry_out(command, seen=True)
        if not self.over:
            self.go_on()

    def carry_out(self, command: do.SourceCommand, *, seen: bool) -> None:
        """Carry an order out; `seen` ones have a point behind them."""
        world = self.node.world
        if world.transcript is not None:
            world.say(self.node.name, f"    {in_a_line(command)}")
        try:
            self.shell.carry_out(command)
        except (AgentRefused, AgentGone, DeviceNotReady) as error:
            self.post(told.HostFailed(f"{type(command).__name__}: {error}"))
        except RemoteProtocolError as error:
            self.post(told.PeerLost(f"{type(command).__name__}: {error}"))
        if seen:
            world.reach(points.after("source", type(command)))

    # -- for the shell -------------------------------------------------------------------------

    def post_first(self, event: told.SourceEvent) -> None:
        """Before everything that is queued."""
        self._first.appendleft(event)

    def disarm(self, timer: told.Timer) -> None:
        """It does not fire."""
        self._timers.pop(timer, None)

    def hurry(self) -> None:
        """Every timer that is armed fires now."""
        for timer in tuple(self._timers):
            del self._timers[timer]
            self.post(told.TimerFired(timer))

    def arm(self, timer: told.Timer, delay_ms: int) -> None:
        """In so many milliseconds; again replaces."""
        mark = self._timers[timer] = object()

        def fire() -> None:
            if self._timers.get(timer) is mark:
                del self._timers[timer]
                self.post(told.TimerFired(timer))

        self.node.world.after(delay_ms * MS, fire, self.node)

    def finish(self, command: do.EndMigration) -> None:
        """The attempt is over."""
        if self._cancelled and command.outcome == "completed":
            raise ViolationError("a wish that is effective ends the attempt", f"it ended {command.outcome}")
        self.over = True
        self.shell.release()
        self._ended(self, command)
