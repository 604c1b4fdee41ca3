"""Brings hint batches from the balloon device's thread to whichever role listens at the moment.

The device exists as long as the host; a migration does not. Batches that nobody listens for are dropped:
outside a migration no command id is open, and a dropped hint is always safe.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.balloon_server import HintBatch


class HintRelay:
    """One listener at a time; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listener: Callable[[HintBatch], None] | None = None

    def __call__(self, batch: HintBatch) -> None:
        """The device's sink."""
        with self._lock:
            listener = self._listener
        if listener is not None:
            listener(batch)

    def listen(self, listener: Callable[[HintBatch], None] | None) -> None:
        """Set the listener, or None for nobody."""
        with self._lock:
            self._listener = listener
