"""The pause gate: where guest threads may be stopped.

Rule 1: a guest thread touches guest RAM, the rings and the oracle only inside the gate, slice by slice.
Rule 2: `pause` returns when nobody is inside; from then on guest RAM does not change until `open`.
Rule 3: a thread inside waits for nothing, unless the wait is bounded by a few milliseconds.
Rule 4: a pause that could not be had in time leaves the gate as it found it: the guest goes on.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from guest_agent.errors import GateShut, PauseTimeout

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["PAUSE_S_MAX", "PauseGate"]

PAUSE_S_MAX = (
    2.0  # a slice takes <= 5 ms; a machine that is swapping or stopped may take longer, never for ever
)


class PauseGate:
    """Guest threads write `with gate:` around every slice. It starts closed and is not re-entrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._open = False
        self._shut = False
        self._inside = 0

    @property
    def is_open(self) -> bool:
        """Whether guest threads may run slices now."""
        return self._open

    def __enter__(self) -> None:
        with self._condition:
            while not self._open and not self._shut:
                self._condition.wait()  # ends: open or shut; a pause lasts as long as its host wants
            if self._shut:
                raise GateShut
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._condition:
            assert self._inside > 0, self._inside
            self._inside -= 1
            if self._inside == 0 and not self._open:
                self._condition.notify_all()

    def pause(self, timeout_s: float = PAUSE_S_MAX) -> None:
        """Close the gate and wait until all threads are outside. Idempotent.

        Raises:
            PauseTimeout: a thread stayed inside; the gate is open again if it was open before.
        """
        deadline = time.monotonic() + timeout_s
        with self._condition:
            was_open, self._open = self._open, False
            while self._inside:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._open = was_open
                    self._condition.notify_all()
                    raise PauseTimeout(f"{self._inside} guest thread(s) still in a slice after {timeout_s} s")
                self._condition.wait(left)

    def open(self) -> None:
        """Let guest threads in. Idempotent; a gate that was shut stays shut."""
        with self._condition:
            self._open = not self._shut
            self._condition.notify_all()

    def shut(self) -> None:
        """For ever: every thread that is or comes outside gets GateShut and ends."""
        with self._condition:
            self._open, self._shut = False, True
            self._condition.notify_all()
