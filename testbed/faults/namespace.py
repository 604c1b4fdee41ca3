"""A host's network namespace, entered from outside by the id of one of its processes.

Rule 1: a namespace belongs to a thread: it is entered by a thread of its own that ends with the call, so that
        nothing else of this process ever stands in it. What that thread starts or opens stays there.
Rule 2: a process id may be given to somebody else: who returns to a namespace later compares its inode number.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

CLONE_NEWNET: Final = 0x40000000
Answer = TypeVar("Answer")


def namespace_of(pid: int) -> str:
    """The path of a process's network namespace."""
    return f"/proc/{pid}/ns/net"


def inode_of(pid: int) -> int:
    """What tells this namespace from every other that lives; 0 when the process is gone."""
    try:
        return Path(namespace_of(pid)).stat().st_ino
    except OSError:
        return 0


def in_namespace(path: str, action: Callable[[], Answer]) -> Answer:
    """What `action` returns, carried out in the namespace. Raises OSError when it cannot be entered."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def enter_and_act() -> None:
        try:
            enter(path)
            answers.append(action())
        except BaseException as error:  # noqa: BLE001 - it is raised again where it belongs
            errors.append(error)

    thread = threading.Thread(target=enter_and_act, name="namespace")
    thread.start()
    thread.join()  # ends: with the action, whose commands have NFT_S
    if errors:
        raise errors[0]
    return answers[0]


def enter(path: str) -> None:
    """The calling thread, for good. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter the network namespace {path}: {os.strerror(number)}")
    finally:
        os.close(fd)
