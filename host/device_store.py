"""The balloon device's state on disk: what a node that restarts must go on with.

Rule 1: what a guest may see is recorded first: a command id before it is announced, so that no restart issues it
        again (stock Linux ignores an id that it reported for already).
Rule 2: a reader finds the old state or the new one: the file is replaced by rename. It is not forced to the disk:
        a host that loses power loses its guest with it, and then the device's past is of no use.
Rule 3: a file that makes no sense is an error, not an empty device: ids would start again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from host.errors import DeviceStateUnreadable

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
BYTES_MAX = 4096  # of the file: it has about ten numbers


@dataclass(frozen=True, slots=True)
class KeptState:
    """What is kept. `done_owed`: the guest may hold hinted pages until it reads DONE."""

    features: int
    num_pages: int
    actual: int
    poison_value: int
    next_command_id: int
    done_owed: bool


class DeviceStore:
    """One file; the node's journal lock sees to it that there is one writer."""

    def __init__(self, path: Path) -> None:
        self.path = os.fspath(path)
        self._path = path
        self._draft = path.with_name(path.name + ".tmp")
        self._kept: KeptState | None = None

    def load(self) -> KeptState | None:
        """What was kept, None on a host that never had a device.

        Raises:
            DeviceStateUnreadable: the file is no state of ours.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(BYTES_MAX + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DeviceStateUnreadable(self.path, str(error)) from error
        self._kept = self._parsed(data)
        return self._kept

    def keep(self, state: KeptState) -> None:
        """Replace what is kept; nothing is written when nothing changed. Raises OSError."""
        if state == self._kept:
            return
        self._draft.write_text(json.dumps({"version": VERSION, **asdict(state)}))
        self._draft.replace(self._path)
        self._kept = state

    def _parsed(self, data: bytes) -> KeptState:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DeviceStateUnreadable(self.path, f"no JSON: {error}") from error
        if not isinstance(found, dict) or found.pop("version", None) != VERSION:
            raise DeviceStateUnreadable(self.path, f"not version {VERSION}")
        wanted = {field.name: bool if field.name == "done_owed" else int for field in fields(KeptState)}
        if found.keys() != wanted.keys() or any(
            type(found[name]) is not kind for name, kind in wanted.items()
        ):
            raise DeviceStateUnreadable(self.path, "fields are missing, unknown or of another type")
        return KeptState(**found)
