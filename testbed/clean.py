"""Removes what crashed runs left behind, and nothing else.

Rule 1: an object is ours when it carries our label: a process the run's name in its environment and one of
        our command lines, a directory our name, our owner and our lock file.
Rule 2: it is left behind when its run is dead: nobody holds the lock of the run's runtime directory any more.
Rule 3: a process is killed through a descriptor of it (pidfd), and its label is read after that was opened:
        a recycled process id is never hit.
Rule 4: what was removed is told, one line each; a dry run tells the same and does nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.hosts import runtime_dir
from testbed.hosts.local import RUN_LABEL, RUNTIME_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES: Final = ("guest_agent", "host")  # what runs start, as `python -m MODULE`


@dataclass(frozen=True, slots=True)
class LeftProcess:
    """A process of a dead run."""

    pid: int
    run: str
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} of run {self.run}: {self.command}"


@dataclass(frozen=True, slots=True)
class LeftDirectory:
    """A runtime directory of a dead run."""

    path: Path

    def __str__(self) -> str:
        return f"directory {self.path}"


def find() -> list[LeftProcess | LeftDirectory]:
    """Everything that dead runs left behind: processes first, they may hold the directories' sockets."""
    directories = [LeftDirectory(path) for path in runtime_dir.found() if runtime_dir.is_dead(path)]
    return [*_processes(), *directories]


def remove(left: LeftProcess | LeftDirectory) -> bool:
    """Removes one of them; False when it was gone, or was no longer what it had been."""
    return _kill(left) if isinstance(left, LeftProcess) else _delete(left)


def _processes() -> Iterator[LeftProcess]:
    for entry in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        left = _examine(int(entry.name))
        if left is not None:
            yield left


def _examine(pid: int) -> LeftProcess | None:
    """The process, if it is one that a dead run of this user started."""
    entry = Path(f"/proc/{pid}")
    try:
        if entry.stat().st_uid != os.getuid():
            return None
        environment = (entry / "environ").read_bytes().split(b"\0")
        command = os.fsdecode((entry / "cmdline").read_bytes()).rstrip("\0").split("\0")
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    labels = dict(os.fsdecode(item).partition("=")[::2] for item in environment)
    run, runtime = labels.get(RUN_LABEL), labels.get(RUNTIME_LABEL)
    if not run or not runtime or not _is_ours(command) or not _run_is_dead(run, Path(runtime)):
        return None
    return LeftProcess(pid, run, " ".join(command[1:3]))


def _is_ours(command: list[str]) -> bool:
    return len(command) >= 3 and command[1] == "-m" and command[2] in MODULES


def _run_is_dead(run: str, runtime: Path) -> bool:
    # The directory is made before the first process and removed after the last: without it, the run is over.
    if runtime.name != f"{runtime_dir.PREFIX}{run}":
        return False
    return not runtime.exists() or runtime_dir.is_dead(runtime)


def _kill(left: LeftProcess) -> bool:
    try:
        fd = os.pidfd_open(left.pid)
    except ProcessLookupError:
        return False
    try:
        if _examine(left.pid) != left:
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def _delete(left: LeftDirectory) -> bool:
    if not runtime_dir.is_dead(left.path):
        return False
    shutil.rmtree(left.path)
    return True
