"""What was read back of an image that was taken in, a hash a page: a judge asks for it when all is over.

Rule 1: it is on the disk before PREPARED is: from then on this process may die and the migration go well.
Rule 2: it is an artefact only of a guest that was taken in, or of a rehearsal; until then it is a draft. What an
        earlier attempt left is gone before a new one receives anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from migration.pages import U64Array

READ_BACK = "dest_hashes"


class ReadBack:
    """One host's file, and its draft."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / READ_BACK
        self._draft = directory / f"{READ_BACK}.draft"

    def write(self, hashes: U64Array) -> None:
        """Keep them as a draft. Raises OSError."""
        hashes.astype("<u8", copy=False).tofile(self._draft)

    def keep(self) -> None:
        """The draft, if there is one, is what happened."""
        if self._draft.exists():
            self._draft.replace(self._path)

    def drop_draft(self) -> None:
        """Its attempt was given up."""
        self._draft.unlink(missing_ok=True)

    def clear(self) -> None:
        """A new attempt begins."""
        self.drop_draft()
        self._path.unlink(missing_ok=True)
