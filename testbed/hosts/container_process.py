"""A process inside a container: started by the engine's exec, watched by the stream of its output.

Rule 1: its output goes into the run directory as it comes; the end of that stream is the end of the process.
Rule 2: on an engine of this machine it is signalled through a pidfd of its process here; on another machine through
        the engine, by the process id that it left in a file of its own.
Rule 3: who was killed because the memory of its container was spent says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from docker.errors import DockerException

from testbed.errors import RunBrokenError
from testbed.hosts.engine import innermost, told
from testbed.hosts.execution import Execution, run
from testbed.hosts.local import cpu_seconds
from testbed.hosts.process import last_words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

INSIDE: Final = "/run/ballast"  # where a host's sockets and process ids are
START_S: Final = 10.0  # the engine starts a process in tenths of a second
END_S: Final = 5.0  # then it is killed
LOOK_S: Final = 0.005  # between two looks for its process id
LEAVE_PID: Final = 'echo $$ >"$0"; exec "$@"'
KILLED_STATUS: Final = 128


class ContainerProcess:
    """A node or a guest agent in a container (HostProcess). `command` tells how it starts, first and again."""

    def __init__(
        self,
        name: str,
        container: Any,
        *,
        command: Callable[[bool], Sequence[str]],
        user: str,
        local: bool,
        log: Path,
        on_start: Callable[[ContainerProcess], None],
        on_exit: Callable[[ContainerProcess], None],
    ) -> None:
        self.name = name
        self.asked_to_end = False
        self.pid = 0
        self.status = "is not started"
        self.log = log
        self._container = container
        self._command = command
        self._user = user
        self._local = local
        self._on_start = on_start
        self._on_exit = on_exit
        self.wait_until_ready: Callable[[], None] | None = None
        self._gone = threading.Event()
        self._gone.set()
        self._told = threading.Event()  # that it is gone, to the history
        self._watcher: threading.Thread | None = None
        self._execution: Execution | None = None
        self._pidfd = -1
        log.touch()
        self.start(again=False)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return not self._gone.is_set()

    def start(self, *, again: bool) -> None:
        """Starts it; its readiness is not waited for. Raises RunBrokenError."""
        pid_file = f"{INSIDE}/{self.name}.pid"
        command = ["/bin/sh", "-c", LEAVE_PID, pid_file, "python3", "-m", *self._command(again)]
        with told(f"the {self.name} cannot be started"):
            execution = self._execution = Execution(self._container, command, user=self._user)
        self.asked_to_end, self.status = False, "is running"
        self._told.clear()
        self._gone.clear()
        self._watcher = threading.Thread(
            target=self._watch, args=(execution,), name=f"watch-{self.name}", daemon=True
        )
        self._watcher.start()
        if self._local:
            self.pid = self._pid_here(execution)
        self._on_start(self)

    def last_words(self) -> str:
        """What its log ends with."""
        return last_words_of(self.log)

    def cpu_seconds(self) -> float:
        """Of it and its children; 0.0 when it is gone."""
        if self._local:
            return cpu_seconds(self.pid)
        word = f'cat "/proc/$(cat {INSIDE}/{self.name}.pid)/stat"'
        with told(f"the {self.name} cannot be looked at"):
            status, said = run(self._container, ["/bin/sh", "-c", word], user=self._user)
        if status or not self.alive:
            return 0.0
        ticks = [int(word) for word in said.rpartition(")")[2].split()[11:13]]  # proc(5): utime, stime
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL, and waits for the end, which is then in the history."""
        self._signal(signal.SIGKILL)
        if self._watcher is not None and not self._told.wait(END_S):
            raise RunBrokenError(f"the {self.name} did not end within {END_S:.0f} s of its SIGKILL")

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """A new process in place of one that ended. Raises RunBrokenError when it does not come up."""
        if self.alive:
            raise RunBrokenError(f"the {self.name} runs: there is nothing to start again")
        self.join()  # ends: it is not alive
        self.start(again=True)
        if self.wait_until_ready is not None:
            self.wait_until_ready()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        return self._gone.wait(timeout_s)

    def join(self) -> None:
        """Its end is in the history afterwards; for those whose container is gone or who ended."""
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()  # ends: with the process, or its container
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _signal(self, number: signal.Signals) -> None:
        if not self.alive:
            return
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                signal.pidfd_send_signal(self._pidfd, number)
            return
        word = f'kill -{number.name.removeprefix("SIG")} "$(cat {INSIDE}/{self.name}.pid)"'
        with told(f"the {self.name} cannot be signalled"):
            status, said = run(self._container, ["/bin/sh", "-c", word], user=self._user)
        if status and self.alive:
            raise RunBrokenError(f"the {self.name} cannot be signalled: {said}")

    def _pid_here(self, execution: Execution) -> int:
        deadline = time.monotonic() + START_S
        moment = threading.Event()
        while time.monotonic() < deadline:
            with told(f"the {self.name} cannot be looked at"):
                pid = execution.pid()
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    self._pidfd = os.pidfd_open(pid)
                return pid
            if not self.alive:
                return 0
            moment.wait(LOOK_S)  # the engine answers before it knows the process id
        raise RunBrokenError(f"the engine did not say which process the {self.name} is")

    def _watch(self, execution: Execution) -> None:
        with self.log.open("ab", buffering=0) as log:
            try:
                for piece in execution.output():
                    log.write(piece)
            except (DockerException, OSError) as error:  # the engine went away in the middle
                log.write(f"the output ends: {innermost(error)}\n".encode())
        try:
            self.status = _in_words(execution.status())
        except (DockerException, OSError) as error:
            self.status = f"ended ({innermost(error)})"
        self._gone.set()
        try:
            self._on_exit(self)
        finally:
            self._told.set()


def _in_words(code: int | None) -> str:
    if code is None:
        return "ended, and the engine does not say how"
    if code > KILLED_STATUS:
        try:
            return f"was killed by {signal.Signals(code - KILLED_STATUS).name}"
        except ValueError:
            return f"ended with status {code}"
    return f"ended with status {code}"
