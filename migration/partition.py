"""Which page goes by which stream of an attempt.

Rule 1: a page belongs to exactly one stream, which follows from its number and the number of streams alone:
        blocks of BLOCK_PAGES go round the streams. So streams never carry the same page, in any round, and the
        order between them never matters.
Rule 2: both sides keep the rule; the destination refuses a chunk with a page of another stream, because its streams
        store beside each other without a lock between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from migration.errors import RemoteProtocolError

if TYPE_CHECKING:
    from migration.pages import U32Array, U64Array

BLOCK_PAGES = 512  # 2 MiB: chunks stay runs, and a batch of 8 MiB still occupies four streams
STREAMS_MAX = 16  # beyond it threads only wait for each other; each occupies one at the destination


def pages_by_stream(pfns: U64Array, streams: int) -> list[U64Array]:
    """The pages (ascending) of every stream, ascending."""
    if streams == 1:
        return [pfns]
    owner = pfns // BLOCK_PAGES % streams
    return [pfns[owner == stream] for stream in range(streams)]


def check_partition(run_first: U64Array, run_pages: U32Array, *, stream: int, streams: int) -> None:
    """Every page of the runs, each at least one page long, belongs to `stream`.

    Raises:
        RemoteProtocolError: one does not.
    """
    if streams == 1 or not run_first.size:
        return
    first_block, last_block = run_first // BLOCK_PAGES, (run_first + run_pages - 1) // BLOCK_PAGES
    wrong = (first_block != last_block) | (first_block % streams != stream)
    if wrong.any():
        raise RemoteProtocolError(
            "pages of another stream", stream=stream, streams=streams, first=int(run_first[wrong][0])
        )
