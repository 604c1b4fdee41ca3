"""Stops every process of a guest at once, by the kernel's control group freezer.

Rule 1: signals will not do: SIGSTOP kills User-Mode Linux or leaves its programs running, as it traces them.
Rule 2: a freezer is usable when it froze a process of ours; that is tried, never read off a version.
Rule 3: a group holds the processes of one guest and is removed with them.
Rule 4: the order to freeze is repeated until everything stands still. Version 1 looks at each process once; one
that was just entering a ptrace stop is frozen neither then nor later (about one freeze in 300 of a busy guest), and
a second order finds it stopped.

Both kinds serve: `cgroup.freeze` of version 2 first, because a process that it froze can still be killed, then
the controller "freezer" of version 1 (freezer.state), whose frozen processes hold out until they are thawed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from linux_guest.errors import FreezerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

FREEZE_S: Final = 10.0  # milliseconds, unless a process is stuck in the kernel
LOOK_S: Final = 0.001  # version 1 tells nobody when it is done


@dataclass(frozen=True, slots=True)
class Kind:
    """How one version of the freezer is spoken to: a switch, its two words, and where the state is read."""

    switch: str
    freeze: str
    thaw: str
    state: str
    frozen: str


VERSION_1: Final = Kind("freezer.state", "FROZEN", "THAWED", "freezer.state", "FROZEN")
VERSION_2: Final = Kind("cgroup.freeze", "1", "0", "cgroup.events", "frozen 1")


class FreezerGroup:
    """One control group. `path` is where a process writes itself into `cgroup.procs`."""

    def __init__(self, path: Path, kind: Kind) -> None:
        """Speak to the group at `path`; it is there, or `make` makes it."""
        self.path = path
        self._kind = kind

    def make(self) -> None:
        """Make it. Raises OSError."""
        self.path.mkdir()

    def freeze(self) -> None:
        """Stop every process of the group, and return when all stand still. Raises FreezerUnavailableError."""
        deadline = time.monotonic() + FREEZE_S
        self._write(self._kind.freeze)
        while not self.frozen:
            if time.monotonic() > deadline:
                self.thaw()
                raise FreezerUnavailableError(
                    f"{self.path}: not everything stood still within {FREEZE_S:g} s"
                )
            time.sleep(LOOK_S)
            self._write(self._kind.freeze)  # rule 4

    def thaw(self) -> None:
        """Let them go on. Idempotent."""
        self._write(self._kind.thaw)

    def members(self) -> set[int]:
        """Processes in it."""
        return {int(line) for line in (self.path / "cgroup.procs").read_text(encoding="ascii").split()}

    def remove(self) -> None:
        """Remove the group; its processes must have ended. Raises OSError when they have not."""
        deadline = time.monotonic() + FREEZE_S
        while True:
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:  # a process that was killed leaves its group a moment after it was reaped
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_S)
            else:
                return

    def end(self) -> bool:
        """Thaw, kill every process in it, and remove it; false when it was gone already. Raises OSError."""
        try:
            self.thaw()
            while members := self.members():
                for pid in members:
                    self._kill(pid)
        except FileNotFoundError:
            return False
        self.remove()
        return True

    def _kill(self, pid: int) -> None:
        """SIGKILL for a process that is in the group, whoever got its number since."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if pid in self.members():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)

    @property
    def frozen(self) -> bool:
        """Whether everything in it stands still."""
        state = (self.path / self._kind.state).read_text(encoding="ascii")
        return self._kind.frozen in state.splitlines()

    def _write(self, word: str) -> None:
        (self.path / self._kind.switch).write_text(word, encoding="ascii")


def make_group(name: str) -> FreezerGroup:
    """A group that can freeze. Raises FreezerUnavailableError with what was tried."""
    tried = []
    for place, kind in sorted(_places(), key=lambda found: found[1] is not VERSION_2):
        group = FreezerGroup(place / name, kind)
        try:
            group.make()
        except OSError as error:
            tried.append(f"{place}: {error.strerror}")
            continue
        problem = _try_out(group)
        if not problem:
            return group
        tried.append(f"{place}: {problem}")
        group.remove()
    raise FreezerUnavailableError("; ".join(tried) or "no control group file system is mounted")


def groups_named(pattern: str) -> list[FreezerGroup]:
    """Groups whose name matches the shell pattern, wherever `make_group` may have made them."""
    return [
        FreezerGroup(path, kind)
        for place, kind in _places()
        for path in sorted(place.glob(pattern))
        if path.is_dir()
    ]


def unavailable() -> str:
    """Why no guest can be frozen here, or ""."""
    try:
        make_group(f"ballast-probe-{os.getpid()}").remove()
    except FreezerUnavailableError as error:
        return str(error)
    return ""


def _places() -> Iterator[tuple[Path, Kind]]:
    """Directories in which a group may be made: below our own group, or, in a container, below its root."""
    own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        mount_point = Path(left.split()[4])
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup" and "freezer" in options.split(","):
            found = re.search(r"^\d+:(?:[^:]*,)?freezer(?:,[^:]*)?:(/.*)$", own, re.MULTILINE)
            version = VERSION_1
        elif kind == "cgroup2":
            found, version = re.search(r"^0::(/.*)$", own, re.MULTILINE), VERSION_2
        else:
            continue
        below = mount_point / found[1].lstrip("/") if found else mount_point
        for place in dict.fromkeys((below, mount_point)):
            if place.is_dir():
                yield place, version


def _try_out(group: FreezerGroup) -> str:
    """Freeze and thaw a process of ours in it; why it failed, or ""."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            (group.path / "cgroup.procs").write_text(str(process.pid), encoding="ascii")
            group.freeze()
            group.thaw()
        except OSError as error:
            return str(error.strerror)
        except FreezerUnavailableError as error:
            return str(error)
        finally:
            with contextlib.suppress(OSError):
                group.thaw()
            process.kill()
    return ""
