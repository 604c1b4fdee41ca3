"""The source's page streams in virtual time, as source_node/page_stream.py and page_lane.py, over the real reader.

Rule 1: a page is read when its chunk may go; of a chunk that is not acknowledged its page numbers are kept.
Rule 2: after a loss everything waits for `resume`, which sends again what is not stored, first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from migration.errors import RemoteProtocolError
from migration.events import PagesSent
from migration.pages import PAGE_BYTES
from migration.partition import pages_by_stream
from source_node.page_reader import ChunkNumbers, OutgoingChunk, PageReader
from testbed.sim.plants import Plant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from migration.pages import U64Array
    from source_node.packer import Packer
    from testbed.sim.network import Pipe
    from testbed.sim.world import Process, World

SLICE_PAGES = 36  # of a chunk: small, so that much can happen between two
WINDOW_CHUNKS = 6
READ_NS = 120_000

NO_PFNS: U64Array = np.empty(0, np.uint64)


@dataclass(eq=False, slots=True)
class Part:
    """Pages of a batch that go by one stream."""

    round_index: int
    pfns: U64Array
    is_repair: bool = False
    data_pages: int = 0
    zero_pages: int = 0


@dataclass(eq=False, slots=True)
class Marker:
    """Asks for an acknowledgement of everything."""

    round_index: int


@dataclass(eq=False)
class Lane:
    """One stream."""

    numbers: ChunkNumbers
    pipe: Pipe | None = None
    stored_below: int = 0
    round_index: int = 1  # of what was read last
    kept: deque[U64Array] = field(default_factory=deque)
    works: deque[Part | Marker] = field(default_factory=deque)
    ready: deque[OutgoingChunk] = field(default_factory=deque)  # read, and not yet given to the pipe
    acknowledged: U64Array = field(default_factory=lambda: NO_PFNS)  # the chunk stored last
    waiting_for_ack: bool = False
    reading: bool = False
    ended: bool = False


class SimStreams:
    """All page streams of one attempt. Callbacks: `sent`, `acknowledged`, `lost(reason, refused)`."""

    def __init__(
        self,
        world: World,
        process: Process,
        connect: Callable[[], Pipe],
        reader: PageReader,
        packers: Sequence[Packer | None],
    ) -> None:
        self.world = world
        self.sent: Callable[[PagesSent], None]
        self.acknowledged: Callable[[], None]
        self.lost: Callable[[str, bool], None]
        self.was_read: Callable[[U64Array], None] = lambda _: None
        self._process = process
        self._connect = connect
        self._reader = reader
        self._lanes = [
            Lane(ChunkNumbers(index, chunk_pages=SLICE_PAGES, packer=packer))
            for index, packer in enumerate(packers)
        ]
        self._parts: list[Part] = []
        self._parts_unread = 0
        self._unacknowledged = 0
        self._is_lost = False
        self._closing: Callable[[bool], None] | None = None
        self._over = False
        for lane in self._lanes:
            self._open(lane)

    @property
    def sent_chunks(self) -> int:
        """What the destination must have stored in the end."""
        return sum(lane.numbers.next_sequence for lane in self._lanes)

    # -- the attempt ---------------------------------------------------------------------------

    def send(self, round_index: int, pfns: U64Array) -> None:
        """Read and send -> sent."""
        shares = zip(self._lanes, pages_by_stream(pfns, len(self._lanes)), strict=True)
        given = [(lane, Part(round_index, part)) for lane, part in shares if len(part)]
        assert not self._parts_unread, "one batch at a time"
        self._parts = [part for _, part in given]
        self._parts_unread = len(given)
        for lane, part in given:
            lane.works.append(part)
            self._pump(lane)

    def await_acknowledgements(self, round_index: int) -> None:
        """-> acknowledged."""
        first = self._lanes[0]
        asked = [lane for lane in self._lanes if lane is first or lane.works or lane.kept]
        self._unacknowledged = len(asked)
        for lane in asked:
            lane.works.append(Marker(round_index))
            self._pump(lane)

    def resume(self, stored_below: Sequence[int]) -> U64Array:
        """Go on after a loss; the pages that go again."""
        if len(stored_below) != len(self._lanes):
            raise RemoteProtocolError("another number of streams")
        lost = [self._rewind(lane, below) for lane, below in zip(self._lanes, stored_below, strict=True)]
        self._is_lost = False
        for lane in self._lanes:
            self._open(lane)
            self._pump(lane)
        return np.sort(np.concatenate(lost))

    def close(self, done: Callable[[bool], None]) -> None:
        """Half-close; `done` is told whether the destination ended the calls."""
        if all(lane.ended for lane in self._lanes):
            done(True)
            return
        self._closing = done
        for lane in self._lanes:
            if lane.pipe is not None:
                lane.pipe.half_close()

    def cancel(self) -> None:
        """Give the calls up."""
        self._over = True
        for lane in self._lanes:
            if lane.pipe is not None:
                lane.pipe.cancel()

    # -- one stream ----------------------------------------------------------------------------

    def _open(self, lane: Lane) -> None:
        pipe = self._connect()
        lane.pipe, lane.ended = pipe, False
        pipe.at_source = lambda below: self._acknowledged(lane, pipe, below)
        pipe.source_ended = lambda reason, refused: self._ended(lane, pipe, reason, refused)

    def _rewind(self, lane: Lane, stored_below: int) -> U64Array:
        if lane.pipe is not None:
            lane.pipe.cancel()
        lane.pipe = None
        self._count_stored(lane, stored_below)
        lost = np.unique(np.concatenate([NO_PFNS, *lane.kept]))
        unsent = [chunk.pfns for chunk in lane.ready]
        lane.ready.clear()
        lane.kept.clear()
        lane.numbers.next_sequence = stored_below
        lane.waiting_for_ack = False  # a marker that waits is sent again
        lost = np.unique(np.concatenate([lost, *unsent]))
        if self.world.plant is Plant.ACKNOWLEDGED_FORGOTTEN_ON_RECONNECT:
            lost = np.unique(np.concatenate([lost, lane.acknowledged]))
        if len(lost):
            lane.works.appendleft(Part(lane.round_index, lost, is_repair=True))
        if lane.numbers.packer is not None:
            lane.numbers.packer.forget(lost)
        return lost

    def _count_stored(self, lane: Lane, stored_below: int) -> None:
        if not lane.stored_below <= stored_below <= lane.numbers.next_sequence:
            raise RemoteProtocolError("the destination cannot have stored that", stored_below=stored_below)
        for _ in range(stored_below - lane.stored_below):
            lane.acknowledged = lane.kept.popleft()
        lane.stored_below = stored_below

    def _live(self, lane: Lane) -> bool:
        return lane.pipe is not None and not self._is_lost and not self._over

    def _pump(self, lane: Lane) -> None:
        """Read the next chunk in a moment, if one may go."""
        if lane.reading or not self._live(lane) or not (lane.works or lane.ready):
            return
        if len(lane.kept) - len(lane.ready) >= WINDOW_CHUNKS:
            return
        if (
            isinstance(lane.works[0] if lane.works else None, Marker)
            and not lane.ready
            and lane.waiting_for_ack
        ):
            return
        lane.reading = True
        pipe = lane.pipe

        def read() -> None:
            lane.reading = False
            if lane.pipe is pipe and self._live(lane):
                self._read(lane)
            self._pump(lane)

        self.world.after(READ_NS, read, self._process)

    def _read(self, lane: Lane) -> None:
        assert lane.pipe is not None, "a live lane has a connection"
        if not lane.ready and lane.works:
            work = lane.works[0]
            if isinstance(work, Marker):
                if not lane.waiting_for_ack:
                    lane.waiting_for_ack = True
                    self._keep(lane, self._reader.marker(lane.numbers, work.round_index))
            else:
                self._read_part(lane, work)
        if lane.ready:
            lane.pipe.send(lane.ready.popleft().message)

    def _keep(self, lane: Lane, chunk: OutgoingChunk) -> None:
        lane.kept.append(chunk.pfns)
        lane.ready.append(chunk)

    def _read_part(self, lane: Lane, part: Part) -> None:
        lane.round_index = part.round_index
        pfns, part.pfns = part.pfns[:SLICE_PAGES], part.pfns[SLICE_PAGES:]
        for chunk in self._reader.chunks_of(lane.numbers, part.round_index, pfns):
            self._keep(lane, chunk)
            part.data_pages += chunk.data_pages
            part.zero_pages += chunk.zero_pages
        self.was_read(pfns)
        if len(part.pfns):
            return
        lane.works.popleft()
        if part.is_repair:
            return
        self._parts_unread -= 1
        if not self._parts_unread:
            data_pages = sum(done.data_pages for done in self._parts)
            zero_pages = sum(done.zero_pages for done in self._parts)
            self._parts = []
            self.sent(PagesSent(data_pages, zero_pages, data_pages * PAGE_BYTES))

    # -- told by the connections ---------------------------------------------------------------

    def _acknowledged(self, lane: Lane, pipe: Pipe, stored_below: int) -> None:
        if lane.pipe is not pipe or not self._live(lane) or stored_below <= lane.stored_below:
            return
        self._count_stored(lane, stored_below)
        marked = lane.works and isinstance(lane.works[0], Marker) and lane.waiting_for_ack
        if marked and not lane.kept:
            lane.works.popleft()
            lane.waiting_for_ack = False
            self._unacknowledged -= 1
            if not self._unacknowledged:
                self.acknowledged()
        self._pump(lane)

    def _ended(self, lane: Lane, pipe: Pipe, reason: str, refused: bool) -> None:
        if lane.pipe is not pipe or self._over:
            return
        lane.ended = True
        if self._closing is not None:
            done = self._closing
            if reason or refused:
                self._closing = None
                done(False)
            elif all(other.ended for other in self._lanes):
                self._closing = None
                done(True)
        elif not self._is_lost:
            self._is_lost = True
            self.lost(reason or "the destination ended the stream", refused)
