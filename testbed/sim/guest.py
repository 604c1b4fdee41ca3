"""The guest: it allocates, frees, writes and checks itself; its agent holds it, as guest_agent does.

Rule 1: what the guest knows about its pages (kinds, the driver and its rings) is saved and restored as bytes.
Rule 2: under pressure it takes hinted blocks, and asks its balloon for pages.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from testbed.sim.driver import Driver
from testbed.sim.errors import AgentGone, AgentRefused
from testbed.sim.guest_memory import FREE, HELD, KERNEL, KERNEL_PAGES, USED, GuestMemory, Truth
from testbed.sim.ram import SimRam
from testbed.sim.world import Process
from virtio.errors import VirtioError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from testbed.sim.options import Options
    from testbed.sim.world import World
    from virtio.balloon import BalloonConfig

BUSY_NS = 600_000  # between two slices of a guest, at first


class State(Enum):
    """Of an agent, as in guest_agent."""

    STANDBY = "standby"
    RUNNING = "running"
    PAUSED = "paused"
    RESTORED = "restored"
    FROZEN = "frozen"


class Guest(GuestMemory):
    """The guest's kernel in one RAM."""

    def __init__(self, ram: SimRam, truth: Truth, options: Options, dice: random.Random) -> None:
        super().__init__(ram, truth, dice)
        self.driver = Driver(self, options)
        self.throttle_percent = 0
        self._options = options

    # -- life ----------------------------------------------------------------------------------

    def boot(self) -> None:
        """RAM as after some uptime: kept pages, freed pages with old content, pages never touched."""
        self.kinds[:KERNEL_PAGES] = KERNEL
        self.driver.format()
        pages = self.ram.pages
        self.write(np.arange(KERNEL_PAGES, int(pages * self._options.touched), dtype=np.uint64))
        kept = KERNEL_PAGES + int(pages * self._options.kept)
        self.kinds[kept:] = FREE
        self.log()

    def slice(self) -> None:
        """A moment of the guest's life."""
        dice, kind = self.dice, self.dice.random()
        if dice.random() < self._options.idle:
            kind = 1.0
        self.truth.operations += 1
        if kind < 0.45:
            self.write(self.some(USED, dice.randint(1, self._options.writes)))
        elif kind < 0.70:
            self._allocate(dice.randint(1, 4))
        elif kind < 0.92:
            self.kinds[self.some(USED, dice.randint(1, 4))] = FREE
        elif kind < 0.96:
            self.write(self.some(HELD, 2))  # pressure: a held block is given back, and taken
        if self.driver.hinted and dice.random() < self._options.retake:
            self._retake()
        if kind < 0.2:
            self.look(self.some(USED, 8))
        if dice.random() < self._options.hint_diligence:
            self.driver.turn()
        self.log()

    def _allocate(self, count: int) -> None:
        pfns = self.some(FREE, count)
        self.write(pfns, zero=self.dice.random() < 0.2)
        if not len(pfns):
            self.driver.out_of_memory()

    def _retake(self) -> None:
        """Take a block back that was hinted a moment ago, and use it: nothing forbids it."""
        start, pages = self.driver.hinted.popleft()
        pfns = np.arange(start, start + pages, dtype=np.uint64)
        kinds = self.kinds[start : start + pages]
        self.write(pfns[(kinds == FREE) | (kinds == HELD)])

    # -- leaving -------------------------------------------------------------------------------

    def save(self) -> bytes:
        """All that RAM does not say."""
        return json.dumps(self.driver.save()).encode() + b"\0" + self.kinds.tobytes()

    @classmethod
    def restored(
        cls, state: bytes, ram: SimRam, truth: Truth, options: Options, dice: random.Random
    ) -> Guest:
        """The guest that was saved, in another RAM."""
        header, _, kinds = state.partition(b"\0")
        guest = cls(ram, truth, options, dice)
        guest.kinds = np.frombuffer(kinds, np.uint8).copy()
        guest.driver.restore(json.loads(header))
        return guest


class Agent(Process):
    """A guest agent process: it lives on when its node dies, and its guest dies with it."""

    def __init__(self, world: World, name: str, options: Options, truth: Truth) -> None:
        super().__init__(world, name)
        self.state = State.STANDBY
        self.epoch = 0
        self.guest: Guest | None = None
        self.on_ring_stopped: Callable[[], None] = lambda: None
        self.on_ring_started: Callable[[], None] = lambda: None
        self.running_changed: Callable[[], None] = lambda: None
        self.mute = False  # it goes on, and answers nobody
        self._options = options
        self._truth = truth
        self._dice = world.dice(f"guest at {name}")

    def boot(self) -> None:
        """A guest of its own."""
        self.guest = Guest(SimRam(self._options.pages), self._truth, self._options, self._dice)
        self.guest.boot()
        self.epoch = 1
        self._become(State.RUNNING)
        self._live()

    def _live(self) -> None:
        """Slice after slice; slower when nothing goes on."""
        guest, epoch = self.guest, self.epoch
        assert guest is not None, "a guest lives"

        def slice_() -> None:
            if self.guest is not guest or self.epoch != epoch or self.state is State.FROZEN:
                return
            if self.state is State.RUNNING:
                guest.slice()
            pause = self.world.guest_pause_ns()
            self.world.after(pause * 100 // (100 - guest.throttle_percent), slice_, self)

        self.world.after(self._dice.randrange(BUSY_NS), slice_, self)

    def _become(self, state: State) -> None:
        self.world.say(self.name, f"{self.state.value} -> {state.value} at epoch {self.epoch}")
        self.state = state
        self.running_changed()

    def _heard(self) -> None:
        if not self.alive:
            raise AgentGone(f"{self.name} is gone")
        if self.mute:
            raise AgentGone(f"{self.name} does not answer")

    def _allow(self, *states: State) -> Guest:
        self._heard()
        if self.state not in states or self.guest is None:
            raise AgentRefused(f"not possible while the guest is {self.state.value}")
        return self.guest

    # -- what a node asks ----------------------------------------------------------------------

    def hello(self) -> State:
        """How things stand."""
        self._heard()
        return self.state

    def pause(self) -> None:
        """Threads, then rings."""
        self._allow(State.RUNNING, State.PAUSED, State.FROZEN)
        if self.state is State.RUNNING:
            self._become(State.PAUSED)
            self.on_ring_stopped()

    def resume(self, epoch: int) -> None:
        """Go on, at this epoch and no other."""
        self._allow(State.RUNNING, State.PAUSED)
        if epoch != self.epoch:
            raise AgentRefused(f"the guest is at epoch {self.epoch}, not {epoch}")
        if self.state is State.PAUSED:
            self._become(State.RUNNING)
            self.on_ring_started()

    def throttle(self, percent: int) -> None:
        """Take this share of its time."""
        self._allow(State.RUNNING, State.PAUSED).throttle_percent = percent

    def save(self) -> bytes:
        """Of a paused guest."""
        return self._allow(State.PAUSED, State.FROZEN).save()

    def freeze(self) -> None:
        """It was given away."""
        self._allow(State.PAUSED, State.FROZEN)
        self._become(State.FROZEN)

    def stand_by(self) -> None:
        """Let go of a guest that was given away."""
        self._allow(State.FROZEN)
        self.guest = None
        self._become(State.STANDBY)

    def restore(self, epoch: int, state: bytes, ram: SimRam) -> None:
        """Take an image in, of the epoch that is given away."""
        self._heard()
        if self.state is not State.STANDBY:
            raise AgentRefused(f"restore is not possible while the guest is {self.state.value}")
        try:
            self.guest = Guest.restored(state, ram, self._truth, self._options, self._dice)
        except VirtioError as error:
            raise AgentRefused(f"this image cannot be restored: {error}") from error
        self.epoch = epoch
        self._become(State.RESTORED)

    def discard(self) -> None:
        """Drop an image that never ran."""
        self._heard()
        if self.state not in (State.STANDBY, State.RESTORED):
            raise AgentRefused(f"discard is not possible while the guest is {self.state.value}")
        self.guest = None
        self._become(State.STANDBY)

    def run(self, epoch: int) -> None:
        """Run the restored image. Idempotent for one epoch."""
        self._allow(State.RESTORED, State.RUNNING)
        if self.state is State.RUNNING:
            if epoch != self.epoch:
                raise AgentRefused(f"the guest runs at epoch {self.epoch}, not {epoch}")
            return
        if epoch != self.epoch + 1:
            raise AgentRefused(f"the image is of epoch {self.epoch}, it cannot run at {epoch}")
        self.epoch = epoch
        self._become(State.RUNNING)
        self.on_ring_started()
        self._live()

    # -- the front-end -------------------------------------------------------------------------

    def config_changed(self, config: BalloonConfig) -> None:
        """The driver reads the configuration space."""
        if self.guest is not None:
            self.guest.driver.config_changed(config)
