"""The balloon device of a simulated node: the real device, hint session and ring over the guest's memory.

As host/balloon_server.py: what must outlive the process is kept before the guest hears of it; a report that was
open
when the process died is over, and the guest is told DONE.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from host.device_log import DeviceLog
from host.hint_batch import HintBatch, batch_of
from testbed.sim.errors import DeviceNotReady
from testbed.sim.guest import RING, RING_PAGE
from testbed.sim.plants import Plant
from testbed.sim.world import MS
from virtio.balloon import CMD_ID_FIRST
from virtio.balloon_device import BalloonDevice, reader
from virtio.errors import LocalVirtioError
from virtio.hint_session import HintState
from virtio.split_ring import DeviceRing

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.sim.guest import Agent
    from testbed.sim.world import Process, World
    from virtio.hint_session import HintEvent
    from virtio.split_ring import Chain

KICK_NS = 40_000
LATE = 0.3  # how often the device, or the driver, hears of something late
KICK_LATE_NS = 15 * MS


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
        self._process = process
        self._agent = agent
        self._kept = kept
        self._ring: DeviceRing | None = None
        self._done_owed = False
        self._serving = False
        self._dice = world.dice(f"device of {process.name}")
        self.device.negotiate(self.device.features_offered)
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
        self._ring = DeviceRing(guest.ram.memory, RING, next_avail=guest.ring.device_base)
        self._guest_words = guest.ram
        self._read = reader(guest.ram.memory)
        guest.kick = self._kicked
        self._announce()
        self._kicked()

    def disconnect(self) -> None:
        """The rings were stopped, or the agent is gone."""
        self._ring = None

    @property
    def ready(self) -> bool:
        """Whether a driver is up."""
        return self._ring is not None and self._agent.alive

    def _kicked(self) -> None:
        if self._ring is not None and not self._serving:
            self._serving = True
            late = self._dice.random() < LATE
            self.world.after(
                self._dice.randrange(1, KICK_LATE_NS if late else KICK_NS), self._serve, self._process
            )

    def _serve(self) -> None:
        self._serving = False
        batch = self._pass()
        if batch is not None:
            self.sink(batch)

    def _pass(self) -> HintBatch | None:
        ring = self._ring
        if ring is None:
            return None
        events: list[HintEvent] = []
        while chains := ring.pop_all():
            for chain in chains:
                events += self._hint(chain)
            ring.push_many([chain.head for chain in chains])
            ring.publish()
            self._guest_words.touched(RING_PAGE)
        stores = ring.take_stores()
        if self.world.plant is not Plant.DEVICE_STORES_NOT_LOGGED:
            self.log.add_stores(stores)
        self.device.count_errors(ring.take_errors())
        return batch_of(self.command_id, events) if events else None

    def _hint(self, chain: Chain) -> list[HintEvent]:
        session = self.device.hints
        state = session.state
        if self.world.plant is Plant.STALE_ID_ACCEPTED and chain.writable:
            session.state = HintState.STARTED
            events = self.device.process_hint(chain, self._read)
            session.state = state
            return events
        return self.device.process_hint(chain, self._read)

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
        last = self._pass()
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
        self._serve()

    def device_state(self) -> bytes:
        """What the next host's device must carry on with."""
        return json.dumps({**self.device.save(), "hints_open": self._done_owed}, sort_keys=True).encode()

    def adopt_state(self, state: bytes) -> None:
        """Become the device that the guest had elsewhere."""
        saved = json.loads(state)
        self.device.restore(saved)
        self._done_owed = saved["hints_open"]
        self._keep()

    def _keep(self) -> None:
        self._kept["device"] = self.device.save()
        self._kept["done_owed"] = self._done_owed

    def _announce(self) -> None:
        agent, device = self._agent, self.device

        def read() -> None:
            if self._process.alive:
                agent.config_changed(device.hints.config_command_id)

        late = self._dice.random() < LATE
        self.world.after(self._dice.randrange(1, KICK_LATE_NS if late else MS // 4), read, agent)
