"""One process that a run owns, from its start until nothing of it is left.

Rule 1: a process leads a session and a process group of its own; its end is the end of the whole group.
Rule 2: it carries the run's label in its environment and asks the kernel to be killed with its starter: which is,
        to the kernel, the thread that started it. So the thread that watches it starts it, and lives as long.
Rule 3: its output goes to a file; what it said last explains why it died.
Rule 4: it is signalled only while it is not yet reaped, so that a recycled process id is never hit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

TAIL_BYTES = 16 * 1024  # enough of a log to find its last line


class OwnedProcess:
    """A started process. `on_exit` is called once, on a thread of its own, with the process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        on_exit: Callable[[OwnedProcess], None],
    ) -> None:
        self.name = name
        self.log = log
        self.asked_to_end = False
        self._on_exit = on_exit
        self._gone = threading.Event()
        self._told = threading.Event()  # that it is gone, to `on_exit`
        self._process: subprocess.Popen[bytes]
        self._pidfd = -1
        self._error: OSError | None = None
        started = threading.Event()
        self._watcher = threading.Thread(
            target=self._live,
            args=(list(command), dict(environment), started),
            name=f"watch-{name}",
            daemon=True,
        )
        self._watcher.start()
        started.wait()  # ends: it runs, or could not be started
        if self._error is not None:
            raise self._error

    @property
    def pid(self) -> int:
        """Of the process, which is also its group's and session's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return not self._gone.is_set()

    @property
    def status(self) -> str:
        """How it ended, in words."""
        code = self._process.returncode
        if code is None:
            return "is running"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with status {code}"

    def ask_to_end(self) -> None:
        """SIGTERM, once; the end is not waited for."""
        self.asked_to_end = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, and waits for the end; not ours in the sense of `asked_to_end`: it is a fact to be told."""
        self._signal(signal.SIGKILL)
        self._told.wait()  # ends: it was sent SIGKILL

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for whoever is left of the group when the grace is over."""
        self.ask_to_end()
        self.resume()  # a stopped process would not see it
        if not self._gone.wait(grace_s):
            self._signal(signal.SIGKILL)
            self._gone.wait()  # ends: it was sent SIGKILL
        self._watcher.join()  # ends: the process is gone
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        if not self.alive:
            return
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        return self._gone.wait(timeout_s)

    def last_words(self) -> str:
        """What its log ends with: a plain line, or a JSON line's complaint; "" when it complained of nothing."""
        return last_words_of(self.log)

    def _live(self, command: list[str], environment: dict[str, str], started: threading.Event) -> None:
        try:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    start_new_session=True,
                )
            # Signals go by this and not by Popen, which would reap the process behind the watcher's back.
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            self._error = error
            return
        finally:
            started.set()
        self._watch()

    def _watch(self) -> None:
        # Not reaped yet: until then the group's id cannot be given to anybody else.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()  # ends: waitid saw its end
        self._gone.set()
        try:
            self._on_exit(self)
        finally:
            self._told.set()


def last_words_of(path: Path) -> str:
    """What a log ends with; see `OwnedProcess.last_words`."""
    with path.open("rb") as log:
        log.seek(0, os.SEEK_END)
        log.seek(max(0, log.tell() - TAIL_BYTES))
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return _message(lines[-1]) if lines else ""


def _message(line: str) -> str:
    try:
        document = json.loads(line)
    except ValueError:
        return line
    if not isinstance(document, dict):
        return line
    if document.get("level") in ("debug", "info"):
        return ""  # what it was doing is no reason why it ended
    parts = [str(document[key]) for key in ("event", "reason", "error") if document.get(key)]
    return ": ".join(parts) or line
