"""One thread that waits for descriptors and runs what other threads ask it to.

Rule 1: everything a handler touches belongs to the loop's thread; others get in only by `call`.
Rule 2: a handler does a bounded piece of work and asks for `soon` if more is left, so that no descriptor
        and no caller starves.
Rule 3: nothing is swallowed: a handler that fails ends the loop, and every caller hears of it.
"""

from __future__ import annotations

import os
import selectors
import threading
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from host.errors import LoopEnded

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class CallLoop:
    """The loop and its thread.

    `watch`, `unwatch` and `soon` belong to the loop's thread, or to whoever sets it up before `start`.
    """

    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # bounded: every caller waits for its own
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._soon: dict[object, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._running = True  # calls made before `start` wait for it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.watch(self._wake_fd, READ, self._woken)

    def start(self) -> None:
        """Run the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; calls that did not run raise LoopEnded. Idempotent."""
        with self._lock:
            if self._running:
                self._running = False
                os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is not None:
            self._thread.join()  # ends: a handler does a bounded piece of work
        else:
            self._end(None)

    def call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the loop's thread and return what it returns, or raise what it raises.

        Raises:
            LoopEnded: the loop was stopped or failed.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Result] = Future()
        with self._lock:
            if not self._running:
                raise LoopEnded(self._thread.name)
            self._calls.append((function, future))
            os.eventfd_write(self._wake_fd, 1)
        return future.result()  # ends: run, or LoopEnded

    def watch(self, fd: int, events: int, handler: Callable[[], None]) -> None:
        """Run `handler` whenever `fd` is ready for `events`; replaces an earlier watch. Raises OSError."""
        if fd in self._selector.get_map():
            self._selector.modify(fd, events, handler)
        else:
            self._selector.register(fd, events, handler)

    def unwatch(self, fd: int) -> None:
        """Watch `fd` no more; call it before closing. No-op when it is not watched."""
        watched = self._selector.get_map()  # None once the loop has ended
        if watched is not None and fd in watched:
            self._selector.unregister(fd)

    def soon(self, key: object, handler: Callable[[], None]) -> None:
        """Run `handler` once, after the descriptors had their turn; it replaces an earlier one of the same key."""
        self._soon[key] = handler

    def _woken(self) -> None:
        os.eventfd_read(self._wake_fd)
        for _ in range(len(self._calls)):
            function, future = self._calls.popleft()
            try:
                result = function()
            except Exception as error:  # noqa: BLE001 - it is the caller's, who raises it
                future.set_exception(error)
            else:
                future.set_result(result)

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while self._running:
                for key, _ in self._selector.select(0 if self._soon else None):
                    # A handler may have closed this descriptor, and another may have got its number since.
                    current = self._selector.get_map().get(key.fd)
                    if current is not None and current.data is key.data:
                        key.data()
                soon, self._soon = self._soon, {}
                for handler in soon.values():
                    handler()
        except BaseException as error:
            failure = error
            raise
        finally:
            self._end(failure)

    def _end(self, failure: BaseException | None) -> None:
        with self._lock:
            self._running = False
            waiting, self._calls = self._calls, deque()  # bounded: it is over, nothing is put in
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1
                self._selector.close()
        for _, future in waiting:
            error = LoopEnded(self._thread.name)
            error.__cause__ = failure
            future.set_exception(error)
