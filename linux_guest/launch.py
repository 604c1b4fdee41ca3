"""Runs User-Mode Linux in the way that suits this machine, and ends everything of it with it.

    python -m linux_guest.launch [--cgroup DIR] [--no-xstate] --pids FD -- PROGRAM ARGUMENT...

Rule 1: when the kernel of a User-Mode Linux guest ends, its programs go on, untraced: as programs of this machine,
        with the rights of who started the guest. So it runs in a PID namespace of its own, whose first process
        waits for the kernel and ends with it; Linux then kills whatever is left in the namespace.
Rule 2: whoever dies takes along those below: starter, launcher, first process, kernel.
Rule 3: whatever must hold for every process of the guest is set up before the program runs: all inherit it.
Rule 4: the standard library only: this is on the way of every boot.

Addresses are not randomised, so that a guest of one size has its RAM at one place. With --cgroup all processes of
the guest are in that control group from the start. To FD go two lines: the process ids, as this machine
counts them, of the namespace's first process and of the kernel.

--no-xstate: User-Mode Linux before 6.13 keeps 2696 bytes of extended processor state for a process. A machine
with AMX has 11 KiB, of which Linux takes all or nothing (ptrace PTRACE_SETREGSET fails with EFAULT), and the
guest's init dies at its first instruction. Refusing PTRACE_GETREGSET makes the kernel fall back to the older
PTRACE_GETFPREGS: x87 and SSE state. AVX registers are then lost at every page fault, so programs in the guest
must not use them (uml.WITHOUT_AVX).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Final, NoReturn

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2
CLONE_NEWPID: Final = 0x20000000  # linux/sched.h
ADDR_NO_RANDOMIZE: Final = 0x0040000  # linux/personality.h
READ_PERSONALITY: Final = 0xFFFFFFFF

# linux/seccomp.h, linux/filter.h, linux/ptrace.h; struct seccomp_data is {nr u32, arch u32, ip u64, args u64[6]}.
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_RET_ERRNO: Final = 0x00050000
AUDIT_ARCH_X86_64: Final = 0xC000003E
NR_PTRACE_X86_64: Final = 101
PTRACE_GETREGSET: Final = 0x4204
LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_REQUEST = 0, 4, 16
EIO: Final = 5  # what Linux itself answers for a request it does not know
FILTER: Final = (
    (LOAD_WORD, 0, 0, OFFSET_ARCH),
    (JUMP_IF_EQUAL, 0, 5, AUDIT_ARCH_X86_64),
    (LOAD_WORD, 0, 0, OFFSET_NUMBER),
    (JUMP_IF_EQUAL, 0, 3, NR_PTRACE_X86_64),
    (LOAD_WORD, 0, 0, OFFSET_REQUEST),
    (JUMP_IF_EQUAL, 0, 1, PTRACE_GETREGSET),
    (RETURN, 0, 0, SECCOMP_RET_ERRNO | EIO),
    (RETURN, 0, 0, SECCOMP_RET_ALLOW),
)
_libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse_xstate() -> None:
    """PTRACE_GETREGSET fails for this process and its descendants from now on. Raises OSError."""
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in FILTER)
    program = FilterProgram(len(FILTER), code)
    _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def die_with_starter() -> None:
    """SIGKILL when the starting thread ends. Raises OSError."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def keep_addresses() -> None:
    """No randomisation for programs run from here. Raises OSError."""
    _checked(_libc.personality(_libc.personality(READ_PERSONALITY) | ADDR_NO_RANDOMIZE))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def own_namespace() -> None:
    """Processes forked from here on are in a PID namespace of their own. Raises OSError: it needs root."""
    _checked(_libc.unshare(CLONE_NEWPID))


def main() -> None:
    """Sets up, waits for the guest's end, and ends like it."""
    parser = argparse.ArgumentParser(prog="python -m linux_guest.launch", description=__doc__)
    parser.add_argument("--cgroup", type=Path, help="directory of the control group to join")
    parser.add_argument("--no-xstate", action="store_true", help="refuse PTRACE_GETREGSET")
    parser.add_argument("--pids", type=int, required=True, help="descriptor that is told the process ids")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        die_with_starter()
        own_namespace()
    except OSError as error:
        sys.exit(f"a PID namespace of its own: {error.strerror}")
    first = os.fork()
    if first == 0:
        _be_first(options)
    os.close(options.pids)
    _, status = os.waitpid(first, 0)
    sys.exit(abs(os.waitstatus_to_exitcode(status)))


def _be_first(options: argparse.Namespace) -> NoReturn:
    """The namespace's first process: reaps everybody, ends with the kernel."""
    die_with_starter()
    _tell_pid(options.pids)
    kernel = os.fork()
    if kernel == 0:
        _become_kernel(options)
    os.close(options.pids)
    while True:
        ended, status = os.wait()  # ends: with the guest, whose first process this is
        if ended == kernel:
            os._exit(abs(os.waitstatus_to_exitcode(status)))


def _become_kernel(options: argparse.Namespace) -> NoReturn:
    try:
        if options.cgroup is not None:
            (options.cgroup / "cgroup.procs").write_text("0", encoding="ascii")  # whoever writes it
        die_with_starter()
        keep_addresses()
        if options.no_xstate:
            refuse_xstate()
        _tell_pid(options.pids)
        os.close(options.pids)
        os.execvp(options.command[0], options.command)  # noqa: S606 - to become it is the purpose
    except OSError as error:
        sys.stderr.write(f"{error.filename or options.command[0]}: {error.strerror}\n")
        os._exit(1)


def _tell_pid(fd: int) -> None:
    # /proc is this machine's and not the namespace's: so is the number in it.
    os.write(fd, f"{Path('/proc/self').readlink()}\n".encode())


if __name__ == "__main__":
    main()
