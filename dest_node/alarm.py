"""One timer that is set anew again and again, and what it calls under its owner's lock.

Rule 1: one that was set anew, or cancelled, says nothing any more, also if it waited for the lock by then.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Alarm:
    """`set` is called with `lock` held, as `action` is; `cancel` by anybody."""

    def __init__(self, lock: threading.Lock, action: Callable[[], None]) -> None:
        self._lock = lock
        self._action = action
        self._timer: threading.Timer | None = None

    def set(self, after_s: float) -> None:
        """Call `action` so much later, and not as was said before."""
        self.cancel()
        timer = threading.Timer(after_s, lambda: self._ring(timer))
        timer.daemon = True
        timer.start()
        self._timer = timer

    def cancel(self) -> None:
        """Nothing is called."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _ring(self, timer: threading.Timer) -> None:
        with self._lock:
            if timer is self._timer:
                self._action()
