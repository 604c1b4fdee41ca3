"""Guest threads: they end when the gate shuts, and never silently in any other way.

Rule 1: whatever a guest thread raises is handed to `on_failure`, which ends the agent; nothing is swallowed.
Rule 2: the gate being shut is the one ordinary end.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from guest_agent.errors import GateShut

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GuestThread"]


class GuestThread(threading.Thread):
    """Runs `body` until the gate shuts; any other exception goes to `on_failure(name, error)`."""

    def __init__(
        self, name: str, body: Callable[[], None], on_failure: Callable[[str, BaseException], None]
    ) -> None:
        # Daemonic, so that a thread that hangs cannot keep a failed agent alive; an orderly end joins it.
        super().__init__(name=name, daemon=True)
        self._body = body
        self._on_failure = on_failure

    def run(self) -> None:
        """Run the body; report what it raised."""
        try:
            self._body()
        except GateShut:
            return
        except BaseException as error:  # noqa: BLE001 - the one place that must see everything (rule 1)
            self._on_failure(self.name, error)
