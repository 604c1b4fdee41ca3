"""Ctrl-C, twice understood: the first press cancels in order, the second one hurries.

Rule 1: a press is a fact that waiting code looks at; it never raises out of an arbitrary line.
Rule 2: a signal handler interrupts the main thread anywhere, also while it holds a lock or a buffer. So it writes
        one byte to a pipe and nothing else; a thread of its own makes the press of it and calls the listeners.
Rule 3: the handlers that were there before are there afterwards.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Counts presses of Ctrl-C (and SIGTERM) while it is entered; use it on the main thread."""

    def __init__(self) -> None:
        self._pressed = threading.Event()
        self._hurried = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._listeners: list[Callable[[], None]] = []
        self._pipe = (-1, -1)
        self._pid = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._pid = os.getpid()
        self._pipe = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._read, name="interrupt", daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._pipe[1])  # the end of the pipe is the end of the thread
        if self._thread is not None:
            self._thread.join()  # ends: its pipe is closed
        os.close(self._pipe[0])

    @property
    def pressed(self) -> bool:
        """Whether the user asked to stop."""
        return self._pressed.is_set()

    @property
    def hurried(self) -> bool:
        """Whether the user asked again: nothing is waited for any more."""
        return self._hurried.is_set()

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls `listener` at every press, on a thread of its own."""
        self._listeners.append(listener)

    def ignore(self, listener: Callable[[], None]) -> None:
        """Undoes `listen`."""
        self._listeners.remove(listener)

    def press(self) -> None:
        """What a signal does."""
        if self._pressed.is_set():
            self._hurried.set()
        self._pressed.set()
        for listener in tuple(self._listeners):
            listener()

    def pause(self, seconds: float) -> None:
        """Lets a stated time of the experiment pass; a press ends it early."""
        self._pressed.wait(seconds)

    def pause_unless_hurried(self, seconds: float) -> None:
        """The same, ended early only by the second press."""
        self._hurried.wait(seconds)

    def _handle(self, _number: int, _frame: object) -> None:
        # A library may fork for its own purposes; what its child is told is not for us.
        if os.getpid() == self._pid:
            os.write(self._pipe[1], b"!")

    def _read(self) -> None:
        while os.read(self._pipe[0], 1):
            self.press()
