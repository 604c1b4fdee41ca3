"""The account of bytes as people read it: layers, bytes, shares.

Rule 1: what the layers add up to is what was counted on the wire; the last line says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from testbed.units import format_bytes

if TYPE_CHECKING:
    from testbed.analysis.account import Account

HOW = {"counted": "counted", "modelled": "from the protocol", "rest": "what remains"}


def account_table(account: Account) -> Table:
    """One row per layer that carried anything."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        caption=_caption(account), caption_justify="left",
    )  # fmt: skip
    table.add_column("bytes of")  # where it is narrow words are wrapped, figures never cut
    for heading in ("to the destination", "share", "back"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("known by", no_wrap=True, style="dim")
    whole = account.wire_forward_bytes
    for layer in account.layers:
        table.add_row(
            layer.name,
            _signed(layer.forward_bytes),
            _share(layer.forward_bytes, whole),
            _signed(layer.backward_bytes),
            HOW[layer.how],
        )
    table.add_section()
    where = "at the interface" if account.wire_source == "interface" else "in TCP streams"
    back = _signed(account.wire_backward_bytes)
    table.add_row(
        f"counted {where}", format_bytes(whole), _share(whole, whole), back, "the kernel", style="bold"
    )
    return table


def _caption(account: Account) -> str:
    if account.wire_source != "interface" or not account.packets_forward:
        return ""
    mean = account.wire_forward_bytes / account.packets_forward
    words = [f"{account.packets_forward:,} packets of {format_bytes(mean)} on average"]
    if account.offload:
        words.append(f"offload is on: on a cable they were {format_bytes(account.cable_forward_bytes)}")
    if account.dest_received_bytes is not None:
        words.append(f"the destination received {format_bytes(account.dest_received_bytes)}")
    return "; ".join(words)


def _signed(count: int) -> str:
    return "" if not count else f"-{format_bytes(-count)}" if count < 0 else format_bytes(count)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole and part else ""
