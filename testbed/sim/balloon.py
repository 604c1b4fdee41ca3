"""The balloon device of a simulated node: the real device, hint session, set of pages and rings over guest memory.

As host/balloon_server.py: what must outlive the process is kept before the guest hears of it; a report that was
open when the process died is over, and the guest is told DONE; which pages the balloon holds is not known any more.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from host.balloon_pages import BalloonPages
from host.ballooned import unpack
from host.device_log import DeviceLog
from host.hint_batch import HintBatch, batch_of
from migration.page_bits import PageBits
from testbed.sim.errors import DeviceNotReady
from testbed.sim.guest_memory import RING_PAGES, RINGS
from testbed.sim.plants import Plant
from testbed.sim.world import MS
from virtio.balloon import (
    CMD_ID_FIRST,
    CONFIG_OFFSET_ACTUAL,
    QUEUE_DEFLATE,
    QUEUE_HINT,
    QUEUE_INFLATE,
    QUEUE_REPORTING,
    BalloonConfig,
)
from virtio.balloon_device import BalloonDevice, reader
from virtio.errors import LocalVirtioError
from virtio.hint_session import HintState
from virtio.split_ring import DeviceRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.sim.guest import Agent
    from testbed.sim.ram import SimRam
    from testbed.sim.world import Process, World
    from virtio.hint_session import HintEvent
    from virtio.page_ranges import PageRuns
    from virtio.split_ring import Chain

KICK_NS = 40_000
LATE = 0.3  # how often the device, or the driver, hears of something late
KICK_LATE_NS = 15 * MS
PUNCH_LATE_NS = 25 * MS  # planted


class Region:
    """Guest RAM as host/guest_region.py gives it."""

    def __init__(self, ram: SimRam) -> None:
        self.ram = ram
        self.read = reader(ram.memory)

    def punch(self, pages: PageRuns) -> int:
        """Give the storage back; none fails."""
        for first, count in zip(pages.first.tolist(), pages.count.tolist(), strict=True):
            self.ram.punch(first, count)
        return 0


class SimBalloon:
    """`kept` is the state file, which outlives the process: a dictionary that belongs to the host."""

    def __init__(
        self, world: World, process: Process, agent: Agent, kept: dict[str, Any], pages: int
    ) -> None:
        self.world = world
        self.log = DeviceLog()
        self.sink: Callable[[HintBatch], None] = lambda _: None
        self.command_id = 0
        self.device = BalloonDevice(pages)
        logged = world.plant is not Plant.PUNCHED_PAGES_NOT_LOGGED
        self.pages = BalloonPages(self.device, self.log if logged else DeviceLog())
        self._process = process
        self._agent = agent
        self._kept = kept
        self._rings: dict[int, DeviceRing] = {}
        self._region: Region
        self._done_owed = False
        self._serving: set[int] = set()
        self._dice = world.dice(f"device of {process.name}")
        if kept:
            self.device.restore(kept["device"])
            self._done_owed = kept["done_owed"]
            if self._done_owed or kept["device"]["next_command_id"] != CMD_ID_FIRST:
                self.device.hints_done()

    # -- the front-end -------------------------------------------------------------------------

    def connect(self) -> None:
        """The driver's rings run: go on where the last device stopped."""
        guest = self._agent.guest
        if guest is None:
            return
        driver = guest.driver
        self.device.negotiate(driver.negotiate(self.device.features_offered))
        self._region = Region(guest.ram)
        self._rings = {
            queue: DeviceRing(guest.ram.memory, RINGS[queue], next_avail=ring.device_base)
            for queue, ring in driver.rings.items()
        }
        driver.kick, driver.tell_actual = self._kicked, self._driver_wrote
        self._announce()
        for queue in self._rings:
            self._kicked(queue)

    def disconnect(self) -> None:
        """The rings were stopped, or the agent is gone."""
        self._rings = {}

    @property
    def ready(self) -> bool:
        """Whether a driver is up."""
        return bool(self._rings) and self._agent.alive

    def _kicked(self, queue: int) -> None:
        if queue in self._rings and queue not in self._serving:
            self._serving.add(queue)
            late = self._dice.random() < LATE
            delay_ns = self._dice.randrange(1, KICK_LATE_NS if late else KICK_NS)
            self.world.after(delay_ns, lambda: self._serve(queue), self._process)

    def _serve(self, queue: int) -> None:
        self._serving.discard(queue)
        batch = self._pass(queue)
        if batch is not None:
            self.sink(batch)

    def _pass(self, queue: int) -> HintBatch | None:
        """Everything that a ring holds; for the hint queue, what was hinted."""
        ring = self._rings.get(queue)
        if ring is None:
            return None
        events: list[HintEvent] = []
        while chains := ring.pop_all():
            events += self._handle(queue, chains)
            ring.push_many([chain.head for chain in chains])
            ring.publish()
            self._region.ram.touched(RING_PAGES[queue])
        stores = ring.take_stores()
        if self.world.plant is not Plant.DEVICE_STORES_NOT_LOGGED:
            self.log.add_stores(stores)
        self.device.count_errors(ring.take_errors())
        return batch_of(self.command_id, events) if events else None

    def _handle(self, queue: int, chains: list[Chain]) -> list[HintEvent]:
        region: Any = self._region  # the same face
        if queue == QUEUE_HINT:
            return [event for chain in chains for event in self._hint(chain)]
        work = {
            QUEUE_INFLATE: self.pages.inflate,
            QUEUE_DEFLATE: self.pages.deflate,
            QUEUE_REPORTING: self.pages.report,
        }[queue]
        if queue == QUEUE_INFLATE and self.world.plant is Plant.CHAIN_BACK_BEFORE_PUNCH:
            self.world.after(PUNCH_LATE_NS, lambda: work(region, chains), self._process)
        else:
            work(region, chains)
        return []

    def _hint(self, chain: Chain) -> list[HintEvent]:
        session = self.device.hints
        state = session.state
        if self.world.plant is Plant.STALE_ID_ACCEPTED and chain.writable:
            session.state = HintState.STARTED
            events = self.device.process_hint(chain, self._region.read)
            session.state = state
            return events
        return self.device.process_hint(chain, self._region.read)

    # -- the roles -----------------------------------------------------------------------------

    def open_hints(self) -> int:
        """Ask the guest for a report."""
        if not self.ready:
            raise DeviceNotReady("no guest driver is up that could hint its free pages")
        try:
            command_id = self.device.open_hints()
        except LocalVirtioError as error:
            raise DeviceNotReady(str(error)) from error
        self._done_owed = True
        self._keep()
        self.command_id = command_id
        self._announce()
        return command_id

    def close_hints(self) -> HintBatch:
        """Drain the queue, end the report."""
        last = self._pass(QUEUE_HINT)
        self.device.close_hints()
        self._announce()
        return last if last is not None else batch_of(self.command_id, [])

    def hints_done(self) -> None:
        """The guest may have its pages back."""
        self.device.hints_done()
        self._done_owed = False
        self._keep()
        self._announce()

    @property
    def told_done(self) -> bool:
        """Whether the guest sees DONE, or was never asked."""
        return self.device.hints.state in (HintState.DONE, HintState.IDLE)

    def serve_out(self) -> None:
        """Serve what the rings of a paused guest still hold."""
        for queue in self._rings:
            self._serve(queue)

    def set_num_pages(self, num_pages: int) -> None:
        """Ask for a balloon of this size."""
        if not self.ready:
            raise DeviceNotReady("no guest has connected its balloon")
        self.device.set_num_pages(num_pages)
        self._keep()
        self._announce()

    def ballooned(self, pages: int) -> PageBits:
        """The pages that are in the balloon and have no storage, as far as this process knows."""
        return self.pages.ballooned.bits(pages)

    def device_state(self) -> dict[str, Any]:
        """What the next host's device must carry on with, but for its pages."""
        return {**self.device.save(), "hints_open": self._done_owed}

    def adopt_state(self, state: bytes, pages: int) -> None:
        """Become the device that the guest had elsewhere."""
        saved = json.loads(state)
        ballooned = unpack(bytes.fromhex(saved.pop("ballooned")), pages)
        if self.world.plant is Plant.BALLOON_DROPPED_AT_HANDOVER:
            ballooned = PageBits(pages)
        self.device.restore(saved)
        self.pages.ballooned.become(ballooned)
        self._done_owed = saved["hints_open"]
        self._keep()

    def _keep(self) -> None:
        self._kept["device"] = self.device.save()
        self._kept["done_owed"] = self._done_owed

    def _driver_wrote(self, actual: int) -> None:
        """`actual` of the configuration space."""

        def wrote() -> None:
            if self._rings:
                self.device.write_config(CONFIG_OFFSET_ACTUAL, actual.to_bytes(4, "little"))
                self._keep()

        self.world.after(self._dice.randrange(1, KICK_NS), wrote, self._process)

    def _announce(self) -> None:
        agent, device = self._agent, self.device

        def read() -> None:
            if self._process.alive:
                agent.config_changed(BalloonConfig.from_bytes(device.read_config()))

        late = self._dice.random() < LATE
        self.world.after(self._dice.randrange(1, KICK_LATE_NS if late else MS // 4), read, agent)
