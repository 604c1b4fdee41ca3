"""One User-Mode Linux guest: started, spoken to, and ended with every process it made.

Rule 1: everything of a guest is in one private directory, apart from its RAM, which is an unlinked file that
        only its processes hold.
Rule 2: its end is the end of every process it made, and is waited for (launch.py says why that matters).
Rule 3: every wait has a deadline, and what the guest said last is in the error.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from linux_guest import initrd
from linux_guest.errors import GuestSilentError
from linux_guest.packages import find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from linux_guest.freezer import FreezerGroup

BALLOON_DEVICE: Final = 5  # virtio device number
BOOT_S: Final = 60.0  # 1.3 s on an idle machine
COMMAND_S: Final = 30.0  # of the guest's shell; it answers in milliseconds
POWER_OFF_S: Final = 5.0  # then its processes are killed
LAST_LINES: Final = 20
# Where extended processor state is lost (launch.py), programs must not use it. Names of glibc 2.33 and newer.
WITHOUT_AVX: Final = "GLIBC_TUNABLES=glibc.cpu.hwcaps=" + ",".join(
    f"-{name}" for name in ("AVX", "AVX2", "AVX512F", "AVX512VL", "AVX512BW", "AVX_Fast_Unaligned_Load",
                            "XSAVE", "XSAVEC")
)  # fmt: skip
# start, offset, inode of a shared writable mapping of an unlinked file; see proc_pid_maps(5)
RAM_MAPPING: Final = re.compile(
    r"^([0-9a-f]+)-[0-9a-f]+ rw.s ([0-9a-f]+) \S+ (\d+) +/.* \(deleted\)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Output:
    """What a command in the guest wrote, and how it ended."""

    text: str
    status: int


@dataclass(frozen=True, slots=True)
class RamMapping:
    """How the kernel sees its RAM.

    Attributes:
        base_address: kernel address of physical address 0.
        first_byte: first physical address that is in the file; below it lies the kernel's image, in no file.
        inode: of the file.
    """

    base_address: int
    first_byte: int
    inode: int


class LinuxGuest:
    """A context manager: boots at `__enter__`, gone after `__exit__`.

    Args:
        directory: private to this guest; must exist.
        memory_bytes: RAM.
        vhost_socket: of the balloon device, which must listen already; without, there is no balloon.
        parameters: further words of the kernel's command line.
        group: control group that all of its processes join.
        on_beat: called with every number of the guest's clock, on a thread of its own.

    Raises:
        PackagesMissingError: at once, when this machine lacks the programs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes: int,
        vhost_socket: Path | None = None,
        parameters: Sequence[str] = (),
        group: FreezerGroup | None = None,
        on_beat: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._programs = find()
        self.memory_bytes = memory_bytes
        self.kernel_log = directory / "kernel.log"
        self._directory = directory
        self._vhost_socket = vhost_socket
        self._parameters = parameters
        self._group = group
        self._on_beat = on_beat
        self._process: subprocess.Popen[bytes] | None = None  # the launcher
        self._kernel_pid = 0
        self._first_fd = -1  # of the namespace's first process
        self._lines: _Lines
        self._commands_fd = -1
        self._clock: threading.Thread | None = None
        self._turn = threading.Lock()

    # --- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_up()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of its kernel."""
        assert self._kernel_pid, "not started"
        return self._kernel_pid

    @property
    def alive(self) -> bool:
        """Whether the kernel runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the kernel, which is killed when the thread that calls this ends.

        Raises:
            OSError, GuestSilentError: it cannot be started.
        """
        (self._directory / "initrd").write_bytes(initrd.build(self._programs))
        commands, self._commands_fd = os.pipe()
        answers, answers_end = os.pipe()
        beats, beats_end = os.pipe()
        pids, pids_end = os.pipe()
        given = (commands, answers_end, beats_end, pids_end)
        try:
            with self.kernel_log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(*given),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=given,
                    start_new_session=True,  # a Ctrl-C is its starter's matter
                )
        finally:
            for fd in given:
                os.close(fd)
        self._lines = _Lines(answers)
        self._clock = threading.Thread(
            target=self._hear_beats, args=(beats,), name="guest-clock", daemon=True
        )
        self._clock.start()
        self._take_pids(pids)

    def _take_pids(self, fd: int) -> None:
        with os.fdopen(fd, "rb") as pids:
            told = pids.read().split()  # until the kernel's program runs, or could not be run
        if told:
            self._first_fd = os.pidfd_open(int(told[0]))
        if len(told) != 2:
            raise GuestSilentError(f"the guest was not started: {self.last_words()}")
        self._kernel_pid = int(told[1])

    def _command(self, commands_fd: int, answers_fd: int, beats_fd: int, pids_fd: int) -> list[str]:
        launch = [sys.executable, "-m", "linux_guest.launch", "--pids", str(pids_fd)]
        if self._group is not None:
            launch += ["--cgroup", str(self._group.path)]
        words = [
            str(self._programs.kernel),
            f"mem={self.memory_bytes >> 20}M",
            f"initrd={self._directory / 'initrd'}",
            f"uml_dir={self._directory}",
            "umid=guest",
            "con0=null,fd:1",
            "con=null",
            f"ssl0=fd:{commands_fd},fd:{answers_fd}",
            f"ssl1=null,fd:{beats_fd}",
            "ssl=null",
            "panic=-1",  # a dead kernel is a process that ended, not one that hangs
            *self._parameters,
        ]
        if self._programs.loses_xstate:
            launch.append("--no-xstate")
            words.append(WITHOUT_AVX)
        if self._vhost_socket is not None:
            words.append(f"virtio_uml.device={self._vhost_socket}:{BALLOON_DEVICE}")
        return [*launch, "--", *words]

    def wait_until_up(self, timeout_s: float = BOOT_S) -> None:
        """Until init obeys. Raises GuestSilentError."""
        self._until(initrd.READY, timeout_s)

    def wait_for_end(self) -> None:
        """Until the kernel has ended, however it does; for a thread of its own."""
        assert self._process is not None, "not started"
        with contextlib.suppress(ChildProcessError):  # `alive` or `kill` has reaped it
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def end(self, *, power_off: bool = True) -> None:
        """Power off if asked to, then end every process. Idempotent."""
        if self._process is None:
            return
        if power_off and self.alive:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._commands_fd, b"poweroff -f\n")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(POWER_OFF_S)
        self.kill()
        if self._clock is not None:
            self._clock.join()  # ends: the guest is killed
        if self._commands_fd >= 0:
            os.close(self._commands_fd)
            self._commands_fd = -1
            self._lines.close()

    def kill(self) -> None:
        """End every process of the guest, without asking it. Idempotent."""
        assert self._process is not None, "not started"
        if self._group is not None:
            self._group.thaw()
        if self._first_fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first_fd, signal.SIGKILL)  # and with it its namespace
            os.close(self._first_fd)
            self._first_fd = -1
        self._process.wait()  # ends: it was sent SIGKILL

    # --- the guest --------------------------------------------------------------------------------

    def run(self, command: str, timeout_s: float = COMMAND_S) -> Output:
        """Run one line of shell in the guest, whatever it ends with. Raises GuestSilentError."""
        assert "\n" not in command, "one line"
        with self._turn:
            os.write(self._commands_fd, command.encode() + b"\n")
            lines, status = self._until(initrd.END, timeout_s)
        if lines and not lines[-1]:
            lines.pop()  # the line break before the end mark, for output that ends without one
        return Output("\n".join(lines), int(status))

    def sh(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """The output of a command that must succeed. Raises GuestSilentError."""
        output = self.run(command, timeout_s)
        if output.status != 0:
            raise GuestSilentError(f"{command!r} ended with {output.status}: {output.text[-500:]}")
        return output.text

    def read_file(self, path: str, *, offset: int = 0, size: int | None = None) -> bytes:
        """The bytes of a file in the guest, or of `size` bytes from `offset` on."""
        part = f"skip={offset} iflag=skip_bytes" + ("" if size is None else ",count_bytes,fullblock")
        count = "" if size is None else f"count={size}"
        text = self.sh(f"dd if={path} bs=64k {part} {count} 2>/dev/null | gzip -1 | base64")
        return gzip.decompress(base64.b64decode(text))

    def load_balloon(self, options: str = "") -> None:
        """Load the kernel's driver."""
        self.sh(f"insmod {initrd.BALLOON_PATH} {options}".strip())

    def unload_balloon(self) -> None:
        """Unload it."""
        self.sh("rmmod virtio_balloon")

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo in bytes."""
        found = re.findall(r"^(\S+):\s+(\d+) kB$", self.sh("cat /proc/meminfo"), re.MULTILINE)
        return {name: int(number) << 10 for name, number in found}

    # --- its RAM ----------------------------------------------------------------------------------

    def ram_mapping(self) -> RamMapping:
        """Where the kernel sees its RAM. Raises GuestSilentError when it has none (any more)."""
        maps = Path(f"/proc/{self.pid}/maps").read_text(encoding="ascii")
        found = RAM_MAPPING.search(maps)  # ascending: the first one is the kernel's direct mapping
        if found is None:
            raise GuestSilentError("the guest's kernel maps no RAM: it has not started, or has ended")
        start, offset, inode = int(found[1], 16), int(found[2], 16), int(found[3])
        return RamMapping(base_address=start - offset, first_byte=offset, inode=inode)

    def open_ram(self) -> int:
        """A descriptor of the file that holds RAM: offset == physical address. The caller's to close."""
        inode = self.ram_mapping().inode
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_ino == inode and entry.readlink().name.endswith("(deleted)"):
                    return os.open(entry, os.O_RDWR | os.O_CLOEXEC)
        raise GuestSilentError("the guest's kernel does not hold its RAM open")

    def read_kernel(self, address: int, size: int) -> bytes:
        """Bytes at an address of the guest's kernel. Raises OSError."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    # --- lines ------------------------------------------------------------------------------------

    def _until(self, mark: str, timeout_s: float) -> tuple[list[str], str]:
        """Lines before the one that starts with `mark`, and what follows the mark."""
        deadline = time.monotonic() + timeout_s
        lines: list[str] = []
        while True:
            line = self._lines.next(deadline)
            if line is None:
                ended = "ended" if not self.alive else f"was silent for {timeout_s:g} s"
                raise GuestSilentError(f"the guest {ended}; it said last: {self.last_words(lines)}")
            if line.startswith(mark):
                return lines, line.removeprefix(mark).strip()
            lines.append(line)

    def last_words(self, lines: Sequence[str] = ()) -> str:
        """The newest lines of the kernel's log and of the command under way."""
        log = self.kernel_log.read_text("utf-8", "replace").splitlines()
        return " | ".join([*log[-LAST_LINES:], *lines[-LAST_LINES:]])

    def _hear_beats(self, fd: int) -> None:
        with os.fdopen(fd, "rb") as beats:
            for line in beats:
                if line.strip().isdigit():  # the line may carry half a number when the guest dies
                    self._on_beat(int(line))


class _Lines:
    """Lines from a descriptor, with a deadline. Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = b""
        os.set_blocking(fd, False)

    def next(self, deadline: float) -> str | None:
        """The next line, or None when the writer is gone or the deadline passed."""
        while b"\n" not in self._waiting:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return None
            data = os.read(self._fd, 1 << 16)
            if not data:
                return None
            self._waiting += data
        line, self._waiting = self._waiting.split(b"\n", 1)
        return line.decode("utf-8", "replace").rstrip("\r")

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
