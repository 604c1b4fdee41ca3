"""The table in which results are shown: as airy as there is room for, down to a terminal of 80 columns.

Rule 1: where it is narrow columns stand closer together; only then words are wrapped, and figures are never cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

GAPS: Final = (1, 0)  # beside the one column that stands between two columns anyway
UNLIMITED_COLUMNS: Final = 10_000  # how wide the table would be if nothing were in its way


class FittingTable(Table):
    """Rows below a line, without an edge; whoever wants a blank line around it prints one."""

    def __init__(self, *, caption: str = "") -> None:
        super().__init__(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
            caption=f"\n{caption}" if caption else None, caption_justify="left",
        )  # fmt: skip

    def figures(self, *headings: str) -> None:
        """Adds columns of figures: to the right, and each on one line."""
        for heading in headings:
            self.add_column(heading, justify="right", no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """See Rule 1."""
        for gap in GAPS:
            self.padding = (0, gap, 0, 0)
            wanted = self.__rich_measure__(console, options.update_width(UNLIMITED_COLUMNS)).maximum
            if wanted <= options.max_width:
                break
        yield from super().__rich_console__(console, options)
