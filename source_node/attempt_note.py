"""What a source's journal keeps of an attempt besides its state: with whom it was, why it ended, who knows of it.

Rule 1: it is one line of JSON in the entry's detail, written with every state, so that a process that is started
        again knows whom to ask, and what was not told yet; and a person who opens the file can read it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class AttemptNote:
    """Of one attempt."""

    peer: str  # address of the destination, and the name of its certificate if it has one
    reason: str = ""
    told: bool = False  # migration_ended was
    heard: bool = False  # the destination knows the outcome

    @classmethod
    def read(cls, detail: str) -> Self:
        """As `text` wrote it."""
        return cls(**json.loads(detail))

    @property
    def text(self) -> str:
        """For the journal."""
        return json.dumps(asdict(self))

    @property
    def address(self) -> tuple[str, str]:
        """(address, server name); "" is plain text."""
        address, _, server_name = self.peer.partition(" ")
        return address, server_name

    def ended(self, reason: str) -> Self:
        """The attempt has an outcome, which nobody knows yet."""
        return replace(self, reason=reason, told=False, heard=False)

    def known(self, *, told: bool = False, heard: bool = False) -> Self:
        """Somebody learnt the outcome."""
        return replace(self, told=self.told or told, heard=self.heard or heard)
