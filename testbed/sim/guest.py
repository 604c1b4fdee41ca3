"""The guest: it allocates, frees, writes and checks itself; its agent holds it, as guest_agent does.

Rule 1: what the guest knows about its pages (kinds, the driver's ring) is saved and restored as bytes; what it
        wrote is
        logged outside (`Truth`), so that a guest that went back in time is found out.
Rule 2: a page is written when it is allocated: what a free page holds means nothing to anybody.
Rule 3: hints go through a real ring: id, blocks, STOP. A `hold` driver keeps hinted blocks until DONE and gives
        them
        back under pressure; a `walk` driver keeps nothing.
"""

from __future__ import annotations

import json
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from migration.pages import PAGE_BYTES, mask_runs
from testbed.sim.errors import AgentGone, AgentRefused, ViolationError
from testbed.sim.ram import SimRam
from testbed.sim.world import Process
from virtio.balloon import CMD_ID_DONE, CMD_ID_STOP
from virtio.errors import VirtioError
from virtio.ring_layout import layout_at
from virtio.split_ring import DriverRing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from migration.pages import BoolArray, U8Array, U64Array
    from testbed.sim.options import Options
    from testbed.sim.world import World

USED, FREE, HELD, KERNEL = 0, 1, 2, 3  # kinds of pages
COMMANDS_PAGE, RING_PAGE, KERNEL_PAGES = 0, 1, 2
RING_SIZE = 64
COMMAND_SLOTS = 64
RING = layout_at(RING_PAGE * PAGE_BYTES, RING_SIZE)
BLOCK_PAGES_MAX = 4
BUSY_NS = 600_000  # between two slices of a guest, at first


class State(Enum):
    """Of an agent, as in guest_agent."""

    STANDBY = "standby"
    RUNNING = "running"
    PAUSED = "paused"
    RESTORED = "restored"
    FROZEN = "frozen"


class Truth:
    """What the guest did, logged outside its memory."""

    def __init__(self, pages: int) -> None:
        self.content: U64Array = np.zeros(pages, np.uint64)
        self.kinds: U8Array = np.full(pages, FREE, np.uint8)
        self.void: BoolArray = np.zeros(pages, np.bool_)  # the guest said "free" of a page that it used
        self.versions = 1
        self.operations = 0


class Guest:
    """The guest's kernel in one RAM."""

    def __init__(self, ram: SimRam, truth: Truth, options: Options, dice: random.Random) -> None:
        self.ram = ram
        self.kinds = truth.kinds.copy()
        self.written: BoolArray = np.zeros(ram.pages, np.bool_)  # the kernel's write protection log
        self.ring = DriverRing(ram.memory, RING)
        self.config_id = CMD_ID_STOP  # as last read from the device's configuration space
        self.reported_id = CMD_ID_STOP
        self.reporting: list[tuple[int, int]] | None = None  # blocks that are still to be hinted
        self.kick: Callable[[], None] = lambda: None
        self.throttle_percent = 0
        self._hinted: deque[tuple[int, int]] = deque(maxlen=8)  # blocks hinted last
        self._truth = truth
        self._options = options
        self._dice = dice
        self._slot = 0

    # -- life ----------------------------------------------------------------------------------

    def boot(self) -> None:
        """RAM as after some uptime: kept pages, freed pages with old content, pages never touched."""
        self.kinds[:KERNEL_PAGES] = KERNEL
        self.ring.format()
        self.ram.touched(RING_PAGE)
        pages = self.ram.pages
        self._write(np.arange(KERNEL_PAGES, int(pages * self._options.touched), dtype=np.uint64))
        kept = KERNEL_PAGES + int(pages * self._options.kept)
        self.kinds[kept:] = FREE
        self._log()

    def slice(self) -> None:
        """A moment of the guest's life."""
        truth, dice, kind = self._truth, self._dice, self._dice.random()
        if dice.random() < self._options.idle:
            kind = 1.0
        truth.operations += 1
        if kind < 0.45:
            self._write(self._some(USED, dice.randint(1, self._options.writes)))
        elif kind < 0.70:
            self._write(self._some(FREE, dice.randint(1, 4)), zero=dice.random() < 0.2)
        elif kind < 0.92:
            self.kinds[self._some(USED, dice.randint(1, 4))] = FREE
        elif kind < 0.96:
            self._write(self._some(HELD, 2))  # pressure: a held block is given back, and taken
        if self._hinted and dice.random() < self._options.retake:
            self._retake()
        self._log()
        if kind < 0.2:
            self._look(self._some(USED, 8))
        if dice.random() < self._options.hint_diligence:
            self._report()

    def _retake(self) -> None:
        """Take a block back that was hinted a moment ago, and use it: nothing forbids it."""
        start, pages = self._hinted.popleft()
        pfns = np.arange(start, start + pages, dtype=np.uint64)
        kinds = self.kinds[start : start + pages]
        self._write(pfns[(kinds == FREE) | (kinds == HELD)])

    def _some(self, kind: int, count: int) -> U64Array:
        found = np.flatnonzero(self.kinds == kind)
        if not len(found):
            return found.astype(np.uint64)
        start = self._dice.randrange(len(found))
        return found[start : start + count].astype(np.uint64)

    def _write(self, pfns: U64Array, *, zero: bool = False) -> None:
        truth, count = self._truth, len(pfns)
        if zero:
            contents = np.zeros(count, np.uint64)
        else:
            contents = np.arange(truth.versions, truth.versions + count, dtype=np.uint64)
            truth.versions += count
        self.ram.fill(pfns, contents)
        self.written[pfns] = True
        truth.content[pfns] = contents
        self.kinds[pfns] = USED

    def _look(self, pfns: U64Array) -> None:
        """The guest reads its memory, as guests do."""
        wrong = (self.ram.words[pfns, 0] != self._truth.content[pfns]) & ~self._truth.void[pfns]
        if wrong.any():
            raise ViolationError(
                "no lost write", f"the guest reads page {int(pfns[wrong][0])}: not what it wrote"
            )

    def _log(self) -> None:
        self._truth.kinds = self.kinds.copy()

    # -- hints ---------------------------------------------------------------------------------

    def _report(self) -> None:
        """One step of the free page report."""
        self.ring.used()
        if self.reporting is not None:
            if self.config_id != self.reported_id or not self.reporting:
                if self._command(CMD_ID_STOP):
                    self.reporting = None
            else:
                self._hint_some()
        elif self.config_id not in (CMD_ID_STOP, CMD_ID_DONE, self.reported_id) and self._command(
            self.config_id
        ):
            self.reported_id = self.config_id
            first, count = mask_runs(self.kinds == FREE)
            self.reporting = [
                (start, min(BLOCK_PAGES_MAX, run_end - start))
                for run_start, run_end in zip(first.tolist(), (first + count).tolist(), strict=True)
                for start in range(run_start, run_end, BLOCK_PAGES_MAX)
            ]
        if self.config_id == CMD_ID_DONE and self.reporting is None:
            self.kinds[self.kinds == HELD] = FREE
            self._log()
        if self._options.guest_lies and self._dice.random() < 0.2:
            self._lie()

    def _hint_some(self) -> None:
        assert self.reporting is not None, "no report is open"
        for _ in range(min(self._dice.randint(1, 6), len(self.reporting))):
            start, pages = self.reporting.pop()
            if (self.kinds[start : start + pages] != FREE).any():
                continue  # taken meanwhile: an honest driver hints what it has just allocated
            if self.ring.free_descriptors <= 1:
                break
            if self._options.hint_mode == "hold":
                self.kinds[start : start + pages] = HELD
            self.ring.add([], [(start * PAGE_BYTES, pages * PAGE_BYTES)], None)
            self._hinted.append((start, pages))
        self._log()
        self._publish()

    def _command(self, value: int, length: int = 4) -> bool:
        if self.ring.free_descriptors < 1:
            return False
        self._slot = (self._slot + 1) % COMMAND_SLOTS
        at = COMMANDS_PAGE * PAGE_BYTES + 16 * self._slot
        self.ram.memory[at : at + 4] = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        self.ram.touched(COMMANDS_PAGE)
        self.written[COMMANDS_PAGE] = True
        self.ring.add([(at, length)], [], None)
        self._publish()
        return True

    def _lie(self) -> None:
        """What no driver may do: each costs the guest what it deserves, and nobody else anything."""
        if self.ring.free_descriptors < 8:
            return
        match self._dice.randrange(5):
            case 0:
                self.ring.add([], [((self.ram.pages - 1) * PAGE_BYTES, 1000)], None)
            case 1:
                self._command(self._dice.randrange(2, 2**32))
            case 2:
                self._command(self.config_id, length=3)
            case 3:  # all of memory, and its kernel with it
                if not self._truth.void.all():
                    self._truth.void[:] = True
                    self.ring.add([], [(0, self.ram.pages * PAGE_BYTES)], None)
            case _:
                pfns = self._some(USED, 3)
                self._truth.void[pfns] = True
                for pfn in pfns.tolist():
                    self.ring.add([], [(pfn * PAGE_BYTES, PAGE_BYTES)], None)
        self._publish()

    def _publish(self) -> None:
        kick = self.ring.publish()
        self.written[RING_PAGE] = True
        if kick:
            self.kick()

    # -- leaving -------------------------------------------------------------------------------

    def save(self) -> bytes:
        """All that RAM does not say: a report under way ends here, the next host never saw it begin."""
        fields = {"ring": self.ring.save(), "reported_id": self.reported_id, "slot": self._slot}
        return json.dumps(fields).encode() + b"\0" + self.kinds.tobytes()

    @classmethod
    def restored(
        cls, state: bytes, ram: SimRam, truth: Truth, options: Options, dice: random.Random
    ) -> Guest:
        """The guest that was saved, in another RAM."""
        header, _, kinds = state.partition(b"\0")
        fields = json.loads(header)
        guest = cls(ram, truth, options, dice)
        guest.kinds = np.frombuffer(kinds, np.uint8).copy()
        guest.ring.restore(fields["ring"])
        guest.reported_id, guest._slot = fields["reported_id"], fields["slot"]
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

    def config_changed(self, config_id: int) -> None:
        """The driver reads the configuration space."""
        if self.guest is not None:
            self.guest.config_id = config_id
