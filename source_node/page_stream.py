"""The page streams of one attempt, as one: pages in, who is told what became of them out.

Rule 1: pages are partitioned by migration/partition.py, so that the order between streams never matters.
Rule 2: what is not acknowledged is bounded by WINDOW_CHUNKS over all streams; the bandwidth, if limited, is theirs
        together.
Rule 3: whatever ends a stream before `close` ends them all, and is told once, through `stream_lost`, in one line.
        `refused` says that the destination answered; otherwise the connection went, and may come back.
Rule 4: after a loss everything waits. `resume` opens the streams again, sends again what the destination has not
        stored, and goes on where they stood: every batch that was given is told as it would have been.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from migration.codec import CHUNK_PAGES_MAX, PACKED_PAGES_MAX
from migration.errors import RemoteProtocolError
from migration.events import PagesSent
from migration.pages import PAGE_BYTES
from migration.partition import STREAMS_MAX, pages_by_stream
from source_node.pacer import Pacer
from source_node.packer import PackingOrder, packers, report
from source_node.page_lane import Marker, PageLane, Part, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from migration.pages import U64Array
    from source_node.page_reader import PageReader

__all__ = ["PageStream", "StreamListener", "default_streams", "one_line"]

NOTHING_PACKED = PackingOrder()
WINDOW_CHUNKS = 16  # over all streams: 64 MiB at most between guest RAM and the destination's
PACED_CHUNK_S = 0.05  # of the limit's bytes: what goes at a time, so that a slow limit is kept smoothly
PACED_PAGES_MIN = 16
STREAMS_CHOSEN_MAX = 4  # beyond it one interpreter at each end is what limits


def default_streams(cores: int) -> int:
    """How many streams a host with so many cores opens.

    One keeps about two cores busy, one at each end; another one costs the interpreters' locks a tenth more CPU for
    the same pages, which is lost where both hosts share the cores, and won where cores are idle.
    """
    return min(max(cores // 2, 1), STREAMS_CHOSEN_MAX)


class StreamListener(Protocol):
    """Who is told; from the streams' own threads."""

    def pages_sent(self, sent: PagesSent) -> None:
        """A batch was read; its last chunks are on their way to gRPC."""

    def all_acknowledged(self) -> None:
        """What `await_acknowledgements` asked for."""

    def stream_lost(self, reason: str, *, refused: bool) -> None:
        """A call ended, and not because we closed it; or pages could not be read.

        `refused`: the destination said no, or talks nonsense, or this host failed; nothing can go on. Otherwise the
        connection is lost: `resume` or `cancel` is what may follow.
        """


class PageStream:
    """All streams of one attempt. Its methods are called by one thread.

    Raises:
        ValueError: so many streams cannot be.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        listener: StreamListener,
        reader: PageReader,
        *,
        streams: int,
        bytes_per_second: float | None,
        packing: PackingOrder = NOTHING_PACKED,
    ) -> None:
        if not 0 < streams <= STREAMS_MAX:
            raise ValueError(f"{streams} page streams: 1 to {STREAMS_MAX} are possible")
        self._listener = listener
        self._pacer = Pacer(bytes_per_second) if bytes_per_second is not None else None
        self._lock = threading.Lock()
        self._closing = False
        self._lost = False
        self._parts: list[Part] = []  # of the batch under way
        self._parts_unread = 0
        self._lanes_unacknowledged = 0
        self._packing = packing
        self._packers = packers(packing, streams, reader.pages)
        self._lanes = [
            PageLane(
                index,
                channel,
                self,
                reader,
                pacer=self._pacer,
                packer=self._packers[index],
                chunk_pages=_chunk_pages(packing, bytes_per_second),
                window_chunks=max(WINDOW_CHUNKS // streams, 1),
            )
            for index in range(streams)
        ]
        for lane in self._lanes:
            lane.open()

    # -- figures -------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """How many there are."""
        return len(self._lanes)

    @property
    def sent_chunks(self) -> int:
        """Chunks of the attempt: what the destination must have stored in the end."""
        return sum(lane.sent for lane in self._lanes)

    @property
    def messages(self) -> int:
        """Messages given to gRPC, those included that were lost."""
        return sum(lane.messages for lane in self._lanes)

    @property
    def grpc_bytes(self) -> int:
        """Bytes of these messages, with gRPC's prefix."""
        return sum(lane.grpc_bytes for lane in self._lanes)

    @property
    def resent_pages(self) -> int:
        """Pages that went again because the connection was lost."""
        return sum(lane.resent_pages for lane in self._lanes)

    @property
    def batch_sent(self) -> PagesSent:
        """What of the batch under way is read, for progress."""
        return _sum_of(self._parts)

    @property
    def saved_bytes(self) -> int:
        """What compression and deltas took off the pages' own bytes."""
        return sum(packer.saved_bytes for packer in self._packers if packer is not None)

    def report(self) -> dict[str, object]:
        """`streams`, `compression` and `delta` of the result document, as far as the source knows them."""
        return {"streams": self.streams, **report(self._packing, self._packers)}

    @property
    def limited(self) -> bool:
        """Whether there is a bandwidth limit."""
        return self._pacer is not None

    def measured(self, wire_bytes: int) -> None:
        """So many bytes the kernel counted on this attempt's connections: the bandwidth limit learns from it."""
        if self._pacer is not None:
            self._pacer.measured(self.grpc_bytes, wire_bytes)

    # -- sending -------------------------------------------------------------------------------

    def send(self, round_index: int, pfns: U64Array) -> None:
        """Read and send these pages (ascending, not empty) -> pages_sent, before which no other batch may come."""
        by_stream = [(lane, Part(round_index, part)) for lane, part in self._shares(pfns) if len(part)]
        with self._lock:
            assert not self._parts_unread, "one batch at a time"
            self._parts = [part for _, part in by_stream]
            self._parts_unread = len(by_stream)
        for lane, part in by_stream:
            lane.put(part)

    def _shares(self, pfns: U64Array) -> list[tuple[PageLane, U64Array]]:
        return list(zip(self._lanes, pages_by_stream(pfns, len(self._lanes)), strict=True))

    def await_acknowledgements(self, round_index: int) -> None:
        """Ask for an acknowledgement of everything, and wait for it -> all_acknowledged."""
        # One stream is asked in any case: that it answers shows that the destination is there.
        asked = [lane for lane in self._lanes if lane is self._lanes[0] or lane.busy]
        with self._lock:
            self._lanes_unacknowledged = len(asked)
        for lane in asked:
            lane.put(Marker(round_index))

    def resume(self, stored_below: Sequence[int]) -> U64Array:
        """Go on after a loss, once the destination has said what of each stream it has stored.

        The pages of chunks that it has not stored are read and sent again, before anything else; they were told as
        sent already and are not told again. Batches and `await_acknowledgements` under way are told as ever.

        Returns:
            These pages, ascending. A delta of them starts from nothing.

        Raises:
            RemoteProtocolError: the destination cannot have stored that.
        """
        assert self._lost, "nothing was lost"
        if len(stored_below) != len(self._lanes):
            raise RemoteProtocolError(
                "another number of streams", ours=len(self._lanes), theirs=len(stored_below)
            )
        for lane in self._lanes:
            lane.cancel()
        lost = [lane.rewind(below) for lane, below in zip(self._lanes, stored_below, strict=True)]
        with self._lock:
            self._lost = False
        for lane in self._lanes:
            lane.open()
        return np.sort(np.concatenate(lost))

    def half_close(self) -> None:
        """Nothing more will be sent; `close` waits for the destination to end the calls."""
        self._end()

    def close(self, timeout_s: float) -> bool:
        """Half-close and wait until the destination ended the calls; False when it did not in time."""
        self._end()
        return all(lane.wait_ended(timeout_s) for lane in self._lanes)

    def cancel(self) -> None:
        """Give the calls up. Idempotent."""
        self._end()
        for lane in self._lanes:
            lane.cancel()
        for lane in self._lanes:
            lane.wait_ended(None)

    def _end(self) -> None:
        with self._lock:
            self._closing = True
        for lane in self._lanes:
            lane.wake()

    # -- told by the streams -------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether no stream may send."""
        return self._closing or self._lost

    def part_read(self, _part: Part) -> None:
        """One stream's part of the batch under way is in chunks."""
        with self._lock:
            self._parts_unread -= 1
            if self._parts_unread:
                return
            sent, self._parts = _sum_of(self._parts), []  # from here on the ledger has it
        self._listener.pages_sent(sent)

    def lane_acknowledged(self) -> None:
        """One stream's chunks are all stored."""
        with self._lock:
            self._lanes_unacknowledged -= 1
            if self._lanes_unacknowledged:
                return
        self._listener.all_acknowledged()

    def lane_lost(self, reason: str, *, refused: bool) -> None:
        """One stream ended: they all end."""
        with self._lock:
            if self._closing or self._lost:
                return
            self._lost = True
        for lane in self._lanes:
            lane.wake()
        self._listener.stream_lost(reason, refused=refused)


def _chunk_pages(packing: PackingOrder, bytes_per_second: float | None) -> int:
    pages_max = CHUNK_PAGES_MAX if packing == NOTHING_PACKED else PACKED_PAGES_MAX
    if bytes_per_second is None:
        return pages_max
    return min(max(int(bytes_per_second * PACED_CHUNK_S) // PAGE_BYTES, PACED_PAGES_MIN), pages_max)


def _sum_of(parts: list[Part]) -> PagesSent:
    data_pages = sum(part.data_pages for part in parts)
    return PagesSent(data_pages, sum(part.zero_pages for part in parts), data_pages * PAGE_BYTES)
