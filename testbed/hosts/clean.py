"""Removes what crashed runs left behind, and nothing else.

Rule 1: an object is ours when it carries our label: a process the run's name in its environment and one of
        our command lines, a directory our name, our owner and our lock file, a control group our name and owner, a
        container, network or volume the labels of a run of this user on this machine (hosts/leftovers.py).
Rule 2: it is left behind when its run is dead: nobody holds the lock of the run's runtime directory any more. A
        control group names the agent that made it, and is left behind when that is gone: whatever is in it is a
        guest that nobody holds, and may be frozen.
Rule 3: a process is killed through a descriptor of it (pidfd), and its label is read after that was opened:
        a recycled process id is never hit.
Rule 4: what was removed is told, one line each; a dry run tells the same and does nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from linux_guest.freezer import FreezerGroup, groups_named
from testbed.hosts import leftovers, runtime_dir
from testbed.hosts.leftovers import LeftObject
from testbed.hosts.local import RUN_LABEL, RUNTIME_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES: Final = ("guest_agent", "host", "linux_guest")  # what runs start, as `python -m MODULE`
LINUX_KERNEL: Final = "linux.uml"
GROUP_NAME: Final = re.compile(r"^ballast-[A-Za-z0-9]+-(\d+)$")


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


@dataclass(frozen=True, slots=True)
class LeftGroup:
    """A control group of a Linux guest whose agent is gone."""

    group: FreezerGroup

    def __str__(self) -> str:
        return f"control group {self.group.path}"


Left = LeftProcess | LeftDirectory | LeftGroup | LeftObject


def find() -> list[Left]:
    """Everything that dead runs left behind; see `look`."""
    return look()[0]


def look() -> tuple[list[Left], list[str]]:
    """(everything that dead runs left behind, what could not be looked into).

    Groups come first: what is frozen in them cannot end before it is thawed. Directories come last: processes may
    hold their sockets, and they name the engines that their runs used. They stay while such an engine is away.
    """
    groups = [LeftGroup(group) for group in groups_named("ballast-*-*") if _is_left(group)]
    dead = [path for path in runtime_dir.found() if runtime_dir.is_dead(path)]
    objects, problems = leftovers.find(dead, _run_is_dead)
    directories = [LeftDirectory(path) for path in dead if not (problems and leftovers.contexts_of(path))]
    return [*groups, *objects, *_processes(), *directories], problems


def remove(left: Left) -> bool:
    """Removes one of them; False when it was gone, or was no longer what it had been."""
    match left:
        case LeftProcess():
            return _kill(left)
        case LeftGroup(group):
            return _is_left(group) and group.end()
        case LeftObject():
            return leftovers.remove(left, _run_is_dead)
        case LeftDirectory():
            return _delete(left)


def _is_left(group: FreezerGroup) -> bool:
    """Whether it is one of this user's, and the agent in its name does not live."""
    name = GROUP_NAME.match(group.path.name)
    try:
        if name is None or group.path.stat().st_uid != os.getuid():
            return False
        return "linux_guest" not in _command_line(Path(f"/proc/{name[1]}"))[:3]
    except FileNotFoundError:
        return group.path.is_dir()


def _command_line(entry: Path) -> list[str]:
    return os.fsdecode((entry / "cmdline").read_bytes()).rstrip("\0").split("\0")


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
        command = _command_line(entry)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        return None
    labels = dict(os.fsdecode(item).partition("=")[::2] for item in environment)
    run, runtime = labels.get(RUN_LABEL), labels.get(RUNTIME_LABEL)
    if not run or not runtime or not _is_ours(command) or not _run_is_dead(run, Path(runtime)):
        return None
    return LeftProcess(pid, run, " ".join(command[1:3]))


def _is_ours(command: list[str]) -> bool:
    if Path(command[0]).name == LINUX_KERNEL:
        return True
    return len(command) >= 3 and command[1] == "-m" and command[2].partition(".")[0] in MODULES


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
