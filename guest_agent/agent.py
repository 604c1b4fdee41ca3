"""The agent: what the node may ask of the guest, and in which state.

Rule 1: OPERATIONS names the states in which each operation is allowed; else it is refused and changes nothing.
Rule 2: a guest runs only at the epoch in its own boot page. `resume` and `run` name it and are refused otherwise; a
        frozen guest never runs again.
Rule 3: an error in any guest thread ends the process: logged, told to the node, exit code 1.
Rule 4: all operations run on one thread, the one in `run`.
Rule 5: what was frozen is dropped whole, threads, RAM and all, before another guest may come.

            boot ──▶ RUNNING ◀──resume── PAUSED ──freeze──▶ FROZEN
                        ▲ └─────pause──────▲
                                     FROZEN ─standby─▶ STANDBY
     STANDBY ─restore─▶ RESTORED ─run─▶ RUNNING        RESTORED ─discard─▶ STANDBY
"""

from __future__ import annotations

import base64
import binascii
import gc
import os
import time
from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import structlog

from guest_agent.balloon_options import BalloonOptions
from guest_agent.control import ControlServer, Reply, Request
from guest_agent.errors import GuestAgentError, OperationRefused, OutOfMemory, RestoreError, WorkloadError
from guest_agent.machine import Machine
from guest_agent.state import VcpuState, digest_hex
from guest_agent.threads import GuestThread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guest_agent.machine import MachineOptions

__all__ = ["Agent", "State"]

PROTOCOL_VERSION = 1
KIND = "ballast"
RECORDS_BYTES_MAX = 1 << 31  # an oracle log of 128 million records; the check holds it in memory once


class State(StrEnum):
    """What the agent holds."""

    BOOTING = "booting"  # RAM is there, workloads set themselves up
    RUNNING = "running"
    PAUSED = "paused"
    STANDBY = "standby"  # no guest yet
    RESTORED = "restored"  # a guest that has never run here
    FROZEN = "frozen"  # a guest that was given away


GUEST = frozenset(State) - {State.STANDBY}
STOPPED = frozenset({State.PAUSED, State.RESTORED, State.FROZEN})
OPERATIONS: dict[str, frozenset[State]] = {
    "hello": frozenset(State),
    "ram": GUEST,
    "pause": frozenset({State.RUNNING, State.PAUSED, State.FROZEN}),
    "resume": frozenset({State.RUNNING, State.PAUSED}),
    "reload_balloon": frozenset({State.RUNNING}),
    "throttle": frozenset({State.RUNNING, State.PAUSED}),
    "save": frozenset({State.PAUSED, State.FROZEN}),
    "restore": frozenset({State.STANDBY}),
    "run": frozenset({State.RESTORED, State.RUNNING}),
    "discard": frozenset({State.STANDBY, State.RESTORED}),
    "frames": STOPPED,
    "check": frozenset({State.RUNNING}) | STOPPED,
    "freeze": frozenset({State.PAUSED, State.FROZEN}),
    "standby": frozenset({State.FROZEN}),
    "shutdown": frozenset(State),
}


class Agent:
    """One agent process. `run` serves until the end and returns the exit code."""

    def __init__(
        self,
        options: MachineOptions,
        agent_socket: Path,
        workloads: Sequence[dict[str, Any]] | None,
        balloon: BalloonOptions,
    ) -> None:
        """Take the options; `workloads` None means standby: a guest that comes brings its balloon along."""
        self._balloon = balloon
        self._options = options
        self._workloads = workloads
        self._log = structlog.get_logger(component="agent")
        self._machine: Machine | None = None
        self._state = State.STANDBY
        self._ready = False
        self._ending = False
        self._unconnected: Machine | None = (
            None  # its balloon device is looked for when the node was answered
        )
        # bounded: a thread of the guest fails once, and there are tens
        self._failures: deque[tuple[str, BaseException]] = deque()
        self._booted: deque[bool] = deque()  # bounded: a machine boots once
        self._control = ControlServer(agent_socket, self._handle)
        self._handlers: dict[str, Callable[[Request], Reply]] = {
            "hello": self._hello,
            "ram": self._ram,
            "pause": self._pause,
            "resume": self._resume,
            "reload_balloon": self._reload_balloon,
            "throttle": self._throttle,
            "save": self._save,
            "restore": self._restore,
            "run": self._run_restored,
            "discard": self._discard,
            "frames": self._frames,
            "check": self._check,
            "freeze": self._freeze,
            "standby": self._stand_by,
            "shutdown": self._shutdown,
        }
        assert self._handlers.keys() == OPERATIONS.keys()

    @property
    def wake_fd(self) -> int:
        """For `signal.set_wakeup_fd`: the serving thread wakes when a byte is written here."""
        return self._control.wake_write_fd

    def ask_to_end(self) -> None:
        """End in good order; from any thread or signal handler."""
        self._ending = True
        self._control.wake()

    def run(self) -> int:
        """Boot or stand by, serve until the end; 0, or 1 when the guest failed."""
        try:
            if self._workloads is not None:
                self._boot(self._workloads)
            self._control.serve(self._keep_going)
        except (GuestAgentError, OSError) as error:
            self._log.exception("agent_failed", reason=str(error))
            return 1
        finally:
            self._ending = True
            if self._machine is not None:
                self._machine.stop()
            self._control.close()
        self._log.info("agent_ended", failed=bool(self._failures))
        return 1 if self._failures else 0

    # --- the guest's own events ---

    def _boot(self, workloads: Sequence[dict[str, Any]]) -> None:
        machine = Machine.boot_new(self._options, workloads, self._failed, self._balloon)
        self._machine, self._state = machine, State.BOOTING
        machine.connect()

        def set_up() -> None:
            machine.set_up()
            self._booted.append(True)
            self._control.wake()

        GuestThread("boot", set_up, self._failed).start()

    def _failed(self, thread: str, error: BaseException) -> None:
        """A guest thread raised: from any of them. The serving thread ends the process."""
        if self._ending:
            self._log.info("guest_thread_cut_off", thread=thread, reason=repr(error))
            return
        self._log.error("guest_thread_failed", thread=thread, reason=repr(error), exc_info=error)
        self._failures.append((thread, error))
        self._control.wake()

    def _keep_going(self) -> bool:
        """Between two operations: do what nobody waits for, take note of what the guest's threads reported."""
        unconnected, self._unconnected = self._unconnected, None
        if unconnected is not None and unconnected is self._machine:
            unconnected.connect()
        if self._booted:
            self._booted.clear()
            self._start_booted()
        if self._failures:
            thread, error = self._failures[0]
            reason = f"{type(error).__name__}: {error}"[:1000]
            if isinstance(error, OutOfMemory):
                self._control.notify("oom", thread=thread, reason=reason)
            self._control.notify("workload_failed", thread=thread, reason=reason)
            return False
        return not self._ending

    def _start_booted(self) -> None:
        machine = self._guest()
        machine.start()
        machine.front_end.start_rings(None)  # who hears of a ready guest may ask for hints at once
        self._state = State.RUNNING
        self._ready = True
        self._log.info("guest_ready", pages=machine.ram.pages, free_pages=machine.buddy.free_pages)
        self._control.notify("ready")

    # --- operations ---

    def _handle(self, request: Request) -> Reply:
        """Do one operation. Raises OperationRefused."""
        if self._state not in OPERATIONS[request.op]:
            raise OperationRefused(f"{request.op} is not possible while the guest is {self._state}")
        started = time.perf_counter()
        reply = self._handlers[request.op](request)
        if request.op != "hello":
            took_ms = round((time.perf_counter() - started) * 1000, 3)
            self._log.info("operation", op=request.op, state=self._state.value, took_ms=took_ms)
        return reply

    def _guest(self) -> Machine:
        assert self._machine is not None, self._state
        return self._machine

    def _hello(self, _: Request) -> Reply:
        machine = self._machine
        fields: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "kind": KIND,
            "state": self._state.value,
            "pid": os.getpid(),
            "ready": self._ready,
            "cpu_seconds": time.process_time(),
            "guest_epoch": 0,
            "pages": 0,
            "free_pages": 0,
            "ballooned_pages": 0,
            "held_pages": 0,
            "balloon_ready": False,
            "operations": 0,
            "workloads": {},
            "balloon": {},
        }
        if machine is not None:
            fields |= {
                "guest_epoch": machine.boot.guest_epoch,
                "pages": machine.ram.pages,
                "free_pages": machine.buddy.free_pages,
                "ballooned_pages": machine.balloon.ballooned_pages,
                "held_pages": machine.balloon.held_pages,
                "balloon_ready": machine.front_end.ready,
                "operations": sum(workload.operations for workload in machine.workloads),
                "workloads": {w.name: {"operations": w.operations} for w in machine.workloads},
                "balloon": machine.balloon.facts(),
            }
        return Reply(fields)

    def _ram(self, _: Request) -> Reply:
        ram = self._guest().ram
        tracking = ram.protect()
        return Reply(
            {
                "base_address": ram.base_address,
                "memory_bytes": ram.memory_bytes,
                "write_protect": tracking.reason,
            },
            fds=[ram.fd] if tracking.pagemap_fd is None else [ram.fd, tracking.pagemap_fd],
        )

    def _pause(self, _: Request) -> Reply:
        paused = self._guest().pause()
        if self._state is State.RUNNING:
            self._state = State.PAUSED
        return Reply({"paused_at_ns": paused.at_ns, "ring_bases": list(paused.ring_bases)})

    def _resume(self, request: Request) -> Reply:
        self._check_epoch(request)
        if self._state is State.PAUSED:
            self._guest().resume()
            self._state = State.RUNNING
        return Reply()

    def _reload_balloon(self, request: Request) -> Reply:
        machine = self._guest()
        present = machine.balloon.options
        try:
            options = BalloonOptions.from_dict({**present.to_dict(), **request.fields["options"]})
        except ValueError as error:
            raise OperationRefused(str(error)) from error
        if options.poison != present.poison:
            raise OperationRefused("what freed memory is filled with is the guest's, and does not change")
        return Reply({"features": machine.reload_driver(options)})

    def _throttle(self, request: Request) -> Reply:
        self._guest().vcpu.throttle_percent = request.fields["percent"]
        return Reply()

    def _save(self, _: Request) -> Reply:
        return Reply({"state": base64.b64encode(self._guest().save().to_bytes()).decode()})

    def _restore(self, request: Request) -> Reply:
        fields, memfd = request.fields, request.take_fd()
        try:
            state_bytes = base64.b64decode(fields["state"], validate=True)
            state = VcpuState.from_bytes(state_bytes)
            _check_offer(state, fields)
        except (RestoreError, binascii.Error) as error:
            os.close(memfd)
            raise OperationRefused(f"this image cannot be restored: {error}") from error
        try:
            machine = Machine.restore(self._options, memfd, state, fields["device"]["features"], self._failed)
        except (RestoreError, WorkloadError, ValueError) as error:
            raise OperationRefused(f"this image cannot be restored: {error}") from error
        self._machine, self._state = machine, State.RESTORED
        return Reply({"image_pages": machine.ram.pages, "digest_hex": digest_hex(state_bytes)})

    def _run_restored(self, request: Request) -> Reply:
        machine, epoch = self._guest(), request.fields["guest_epoch"]
        if self._state is State.RESTORED:
            if machine.boot.guest_epoch + 1 != epoch:
                raise OperationRefused(
                    f"this guest runs at epoch {machine.boot.guest_epoch + 1}, not {epoch}"
                )
            machine.boot.guest_epoch = epoch
            machine.start()
            self._unconnected = machine  # nobody waits for the balloon, neither the guest nor the node
            self._state, self._ready = State.RUNNING, True
            self._control.notify("ready")
        self._check_epoch(request)
        return Reply({"started_at_ns": machine.started_at_ns})

    def _discard(self, _: Request) -> Reply:
        if self._machine is not None:
            self._machine.stop()
            self._machine = None
        self._state = State.STANDBY
        return Reply()

    def _frames(self, _: Request) -> Reply:
        return Reply(owned_fds=[self._guest().frames_memfd()])

    def _check(self, request: Request) -> Reply:
        records = _read_file(request.take_fd())
        ok_items, problems = self._guest().check(records)
        self._log.info("self_check", ok_items=ok_items, problems=problems)
        return Reply({"ok_items": ok_items, "problems": problems})

    def _freeze(self, _: Request) -> Reply:
        self._state = State.FROZEN
        return Reply()

    def _stand_by(self, _: Request) -> Reply:
        """Let go of the guest that was given away."""
        machine, self._machine = self._guest(), None
        machine.stop()
        self._state, self._ready = State.STANDBY, False
        self._failures.clear()  # of threads that were cut off with it
        del machine
        gc.collect()  # its parts know each other, and all of them hold views of its RAM
        return Reply()

    def _shutdown(self, _: Request) -> Reply:
        self._ending = True
        return Reply()

    def _check_epoch(self, request: Request) -> None:
        asked, own = request.fields["guest_epoch"], self._guest().boot.guest_epoch
        if asked != own:
            raise OperationRefused(f"{request.op} at epoch {asked}, this guest is of epoch {own}")


def _check_offer(state: VcpuState, fields: dict[str, Any]) -> None:
    """Raise RestoreError unless the node's epoch and device belong to this state."""
    if fields["guest_epoch"] != state.guest_epoch + 1:
        raise RestoreError(
            f"epoch {fields['guest_epoch']} does not follow epoch {state.guest_epoch} of the state"
        )
    bases = tuple(fields["device"]["ring_bases"])
    if bases != state.ring_bases:
        raise RestoreError(f"the device stopped its rings at {bases}, the guest at {state.ring_bases}")


def _read_file(fd: int) -> bytes:
    """All of a descriptor's file from its start; closes it. Raises OperationRefused when it is too large."""
    with os.fdopen(fd, "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if size > RECORDS_BYTES_MAX:
            raise OperationRefused(f"{size} bytes of oracle records, at most {RECORDS_BYTES_MAX} are checked")
        file.seek(0)
        return file.read()
