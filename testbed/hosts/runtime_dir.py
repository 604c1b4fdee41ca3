"""The short-lived directory of a run's sockets, and the proof that its run is alive.

Rule 1: it is made with mode 0700 under XDG_RUNTIME_DIR, or /tmp, and is named ballast-RUN.
Rule 2: paths in it are short: a unix socket's path has at most 107 bytes (unix(7)).
Rule 3: the run holds a lock on a file in it for as long as it lives; whoever gets that lock knows that the
        run is dead. The kernel gives the lock up with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.errors import MachineCannotError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX: Final = "ballast-"
FALLBACK: Final = Path("/tmp")  # noqa: S108 - the names below are made exclusively, mode 0700
LOCK_NAME: Final = "alive.lock"
SOCKET_PATH_BYTES_MAX: Final = 107  # sun_path of sockaddr_un, less its end
SOCKET_NAME_BYTES_MAX: Final = 20  # of the names that runs put into it


class RuntimeDir:
    """Made by the run that owns it; `remove` undoes it."""

    def __init__(self, run_id: str) -> None:
        self.path = base() / f"{PREFIX}{run_id}"
        try:
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise MachineCannotError(
                f"{self.path}: cannot make the run's directory: {error.strerror}"
            ) from error
        self._lock_fd = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def socket(self, name: str) -> Path:
        """The path of a socket in it."""
        path = self.path / name
        assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX, path
        return path

    def remove(self) -> None:
        """Deletes it and gives the lock up."""
        shutil.rmtree(self.path)
        os.close(self._lock_fd)


def base() -> Path:
    """Where runtime directories go."""
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    longest = len(os.fsencode(chosen)) + len(f"/{PREFIX}12345678/") + SOCKET_NAME_BYTES_MAX
    usable = Path(chosen).is_absolute() and os.access(chosen, os.W_OK) and longest <= SOCKET_PATH_BYTES_MAX
    return Path(chosen) if usable else FALLBACK


def bases() -> list[Path]:
    """Every place where a run of this user may have put its directory."""
    return list(dict.fromkeys([base(), FALLBACK]))


def is_dead(path: Path) -> bool:
    """Whether the run that made this runtime directory is no more."""
    try:
        fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # not one of ours, or being made at this moment
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def found() -> Iterator[Path]:
    """All runtime directories of this user, of live and dead runs."""
    for place in bases():
        for path in sorted(place.glob(f"{PREFIX}*")):
            if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.getuid():
                yield path
