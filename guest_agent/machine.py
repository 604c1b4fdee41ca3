"""The guest as one thing: RAM, memory manager, workloads, balloon, threads; booted here or restored here.

Rule 1: a restored machine is built from RAM and the vCPU state alone, and building it writes nothing to RAM: an
        image that is discarded, or compared, is as it came.
Rule 2: pausing goes in one order: all guest threads outside the gate, then the rings stopped, then what the device
        used is taken back.
Rule 3: threads are started once, by `start`; from then on only the gate decides whether they run.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guest_agent.balloon import Balloon
from guest_agent.balloon_options import BalloonOptions
from guest_agent.beats import Beats
from guest_agent.boot import BootPage
from guest_agent.buddy import BuddyAllocator
from guest_agent.clock import GuestClock, host_now_ns
from guest_agent.compaction import Compaction
from guest_agent.errors import OperationRefused, RestoreError
from guest_agent.frames import FrameTable
from guest_agent.front_end import FrontEnd
from guest_agent.gate import PauseGate
from guest_agent.oracle import OracleLog, expectations
from guest_agent.poison import Poison
from guest_agent.ram import GuestRam
from guest_agent.ring_area import RingArea
from guest_agent.state import VcpuState, WorkloadState
from guest_agent.threads import GuestThread
from guest_agent.vcpu import Vcpu
from guest_agent.workloads import Guest, build_workloads
from guest_agent.workloads.retake import Retake

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guest_agent.workloads.base import Workload

__all__ = ["Machine", "MachineOptions", "Paused"]

FIRST_EPOCH = 1
JOIN_S_MAX = 2.0  # a thread ends at its next slice, within milliseconds
UNLOAD_S_MAX = 5.0  # deflating a GiB takes a fraction of it
PROBLEM_CHARACTERS_MAX = 200  # a hundred of them fit in one sideband datagram
PROBLEMS_MAX = 100  # of one self-check: they go in one sideband datagram


@dataclass(frozen=True, slots=True)
class MachineOptions:
    """What a machine is given by whoever starts the process."""

    name: str
    memory_bytes: int
    seed: int
    vhost_socket: Path
    beats: Path
    oracle: Path


@dataclass(frozen=True, slots=True)
class Paused:
    """When the last guest thread and the last ring stood still, and where the rings stopped."""

    at_ns: int
    ring_bases: tuple[int, ...]


class Machine:
    """One guest. Its methods belong to the agent's main thread, `set_up` to the booting thread."""

    def __init__(
        self,
        options: MachineOptions,
        ram: GuestRam,
        boot: BootPage,
        specs: Sequence[dict[str, Any]],
        *,
        seed: int,
        clock_ns: int,
        on_failure: Callable[[str, BaseException], None],
        balloon: BalloonOptions,
    ) -> None:
        self.options = options
        self.ram = ram
        self.boot = boot
        self.paused: Paused | None = None
        self.started_at_ns = 0
        self._on_failure = on_failure
        self._seed = seed
        self._specs = list(specs)
        self._stopping = threading.Event()
        self._threads: list[GuestThread] = []
        self._balloon_thread: GuestThread | None = None
        self.workloads: list[Workload] = build_workloads(specs)
        self.frames = FrameTable(ram, boot)
        self.buddy = BuddyAllocator(ram, boot, self.frames)
        if balloon.poison is not None:
            self.buddy.poison = Poison(ram, balloon.poison)
        self.gate = PauseGate()
        self.clock = GuestClock(clock_ns)
        self._oracle = OracleLog(options.oracle)
        self._guest = Guest(ram=ram, frames=self.frames, buddy=self.buddy, oracle=self._oracle, seed=seed)
        self.vcpu = Vcpu(self.workloads, self.clock, self.gate, self._stopping)
        self._beats = Beats(options.beats, boot, self.gate, self._stopping)
        self._area = RingArea(boot.ring_address)
        self.front_end = FrontEnd(options.vhost_socket, ram, self._area.layouts, self._stopping)
        self.balloon = self._load_driver(balloon)

    @classmethod
    def boot_new(
        cls,
        options: MachineOptions,
        specs: Sequence[dict[str, Any]],
        on_failure: Callable[[str, BaseException], None],
        balloon: BalloonOptions,
    ) -> Machine:
        """A new guest with empty memory. `set_up` and `start` make it run.

        Raises:
            ValueError: the memory size is impossible. WorkloadError: a workload's options are.
        """
        ram = GuestRam.create(options.memory_bytes)
        try:
            ram.protect()
            boot = BootPage.format(ram, guest_epoch=FIRST_EPOCH)
            return cls(
                options,
                ram,
                boot,
                specs,
                seed=options.seed,
                clock_ns=0,
                on_failure=on_failure,
                balloon=balloon,
            )
        except BaseException:
            ram.close()
            raise

    @classmethod
    def restore(
        cls,
        options: MachineOptions,
        memfd: int,
        state: VcpuState,
        device_features: int,
        on_failure: Callable[[str, BaseException], None],
    ) -> Machine:
        """A guest from its RAM and its state. `start` makes it run. `memfd` is taken over, also on errors.

        Raises:
            RestoreError: RAM and state are not one guest.
        """
        try:
            ram = GuestRam.adopt(memfd, options.memory_bytes)
        except BaseException:
            os.close(memfd)
            raise
        machine = None
        try:
            ram.protect()
            boot = BootPage.open(ram)
            _check_image(ram, boot, state)
            specs = [workload.spec for workload in state.workloads]
            machine = cls(
                options,
                ram,
                boot,
                specs,
                seed=state.seed,
                clock_ns=state.clock_ns,
                on_failure=on_failure,
                balloon=_balloon_options(state),
            )
            machine._restore_parts(state, device_features)
        except BaseException:
            if machine is not None:
                machine.stop()
            else:
                ram.close()
            raise
        return machine

    def set_up(self) -> None:
        """Set all workloads up, one after the other: the guest boots."""
        if self.buddy.poison is not None:
            self.buddy.poison.fill_free(self.frames)
        for workload in self.workloads:
            workload.set_up(self._guest)

    def reload_driver(self, options: BalloonOptions) -> int:
        """Remove the balloon driver of the running guest and load it again; the features it agreed on.

        Everything is given back first: ballooned pages, held blocks, what is being reported. The device sees a
        reset: new rings, and features negotiated from the beginning. Memory goes on being poisoned as it was.

        Raises:
            OperationRefused: the device did not take the balloon back in time (the driver goes on leaving, and may
                be asked to once more), or none came for the new driver.
        """
        old, thread = self.balloon, self._balloon_thread
        assert thread is not None, "the guest runs"
        old.unload()
        thread.join(UNLOAD_S_MAX)
        if thread.is_alive():
            raise OperationRefused(f"the balloon driver could not give everything back in {UNLOAD_S_MAX} s")
        self.gate.pause()
        try:
            self.front_end.stop_rings()
            old.detach()
            old.close()
            self.front_end.reset_device()
            self.ram.bytes[self.boot.ring_pfn : self.boot.ring_pfn + self.boot.ring_pages] = 0
            self.balloon = self._load_driver(options)
        finally:
            self.gate.open()
        self.front_end.start_rings(None)
        self._balloon_thread = self._spawn("balloon", self.balloon.run)
        if not self.front_end.wait_ready(UNLOAD_S_MAX):
            raise OperationRefused(f"the balloon driver found no device within {UNLOAD_S_MAX} s")
        return self.balloon.features

    def connect(self) -> None:
        """Start looking for the node's balloon device; what it wants is done once the guest runs."""
        self._spawn("front_end", self.front_end.run)

    def start(self) -> None:
        """Start the guest's threads and let them run; its balloon's rings follow as soon as there is a device."""
        self._balloon_thread = self._spawn("balloon", self.balloon.run)
        self._spawn("vcpu", self.vcpu.run)
        self._spawn("beats", self._beats.run)
        paused, self.paused = self.paused, None
        self.started_at_ns = host_now_ns()
        self.clock.start()
        self.gate.open()
        self.front_end.want_rings(paused.ring_bases if paused else None)

    def pause(self) -> Paused:
        """Stop the guest (rule 2). Idempotent.

        Raises:
            PauseTimeout: a thread is stuck in a slice; the guest goes on.
        """
        if self.paused is None:
            self.gate.pause()
            self.clock.stop()
            bases = self.front_end.stop_rings()
            self.balloon.settle()
            self.paused = Paused(host_now_ns(), tuple(bases))
        return self.paused

    def resume(self) -> None:
        """Let the guest go on where it stood. Idempotent."""
        paused, self.paused = self.paused, None
        self.clock.start()
        self.gate.open()
        # Last: the guest need not wait for its balloon, and what it queues meanwhile the device finds at its start.
        self.front_end.start_rings(paused.ring_bases if paused else None)

    def save(self) -> VcpuState:
        """The vCPU state of the paused guest."""
        assert self.paused is not None
        return VcpuState(
            guest_epoch=self.boot.guest_epoch,
            pages=self.ram.pages,
            seed=self._seed,
            clock_ns=self.clock.now_ns(),
            driver=self.balloon.save(),
            rings=self.balloon.save_rings(),
            ring_bases=self.paused.ring_bases,
            workloads=tuple(
                WorkloadState(spec, workload.registers())
                for spec, workload in zip(self._specs, self.workloads, strict=True)
            ),
        )

    def check(self, records: bytes) -> tuple[int, list[str]]:
        """Every workload's and the allocator's self-check, with the guest threads stopped for its duration.

        Args:
            records: the oracle log, complete up to the moment the guest was last paused.

        Returns:
            (expected items that were right, at most 100 problems).
        """
        expected = expectations(records)
        was_open = self.gate.is_open
        self.gate.pause()
        try:
            problems = [f"memory manager: {problem}" for problem in self.buddy.check()]
            known = {workload.id for workload in self.workloads}
            problems += [
                f"workload {id_} logged and is not here" for id_ in sorted({i for i, _ in expected} - known)
            ]
            for workload in self.workloads:
                problems += [f"{workload.name}: {problem}" for problem in workload.check(expected)]
        finally:
            if was_open:
                self.gate.open()
        items = sum(int(items.size) for items, _ in expected.values())
        return max(0, items - len(problems)), [p[:PROBLEM_CHARACTERS_MAX] for p in problems[:PROBLEMS_MAX]]

    def frames_memfd(self) -> int:
        """A memfd with one byte per page: 0 used, 1 free, 2 ballooned, 3 held. The caller's to close."""
        summary = self.frames.summary().data
        fd = os.memfd_create("ballast-frames", os.MFD_CLOEXEC)
        try:
            written = 0
            while written < len(summary):
                written += os.write(fd, summary[written:])
        except BaseException:
            os.close(fd)
            raise
        return fd

    def stop(self) -> None:
        """End all threads and let go of everything. A thread that does not end in time is left to the exit."""
        self._stopping.set()
        self.gate.shut()
        self.balloon.wake()
        self.front_end.wake()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_S_MAX)
        self.balloon.close()
        self.front_end.close()
        self._beats.close()
        self._oracle.close()
        self.ram.close()

    def _spawn(self, name: str, body: Callable[[], None]) -> GuestThread:
        thread = GuestThread(name, body, self._on_failure)
        self._threads.append(thread)
        thread.start()
        return thread

    def _load_driver(self, options: BalloonOptions) -> Balloon:
        balloon = Balloon(
            self.ram,
            self.frames,
            self.buddy,
            self._area,
            front_end=self.front_end,
            gate=self.gate,
            options=options,
        )
        self.buddy.compact = Compaction(self.buddy, balloon.move_pages).make_block
        for workload in self.workloads:
            if isinstance(workload, Retake):
                balloon.before_hint_kick(workload.take_back)
        return balloon

    def _restore_parts(self, state: VcpuState, device_features: int) -> None:
        for workload, saved in zip(self.workloads, state.workloads, strict=True):
            workload.restore(self._guest, saved.registers)
        self.balloon.restore(state.driver, state.rings)
        if self.balloon.features != device_features:
            raise RestoreError(
                f"driver features {self.balloon.features:#x}, device features {device_features:#x}"
            )
        self.paused = Paused(host_now_ns(), state.ring_bases)


def _check_image(ram: GuestRam, boot: BootPage, state: VcpuState) -> None:
    if not boot.memory_ready:
        raise RestoreError("the memory image has no memory manager: its guest never booted")
    if state.pages != ram.pages:
        raise RestoreError(f"the state is of a guest of {state.pages} pages, the image has {ram.pages}")
    if state.guest_epoch != boot.guest_epoch:
        raise RestoreError(
            f"the state is of epoch {state.guest_epoch}, the image of epoch {boot.guest_epoch}"
        )


def _balloon_options(state: VcpuState) -> BalloonOptions:
    options = state.driver.get("options")
    if not isinstance(options, dict):
        raise RestoreError("the vCPU state says nothing about its balloon driver")
    try:
        return BalloonOptions.from_dict(options)
    except ValueError as error:
        raise RestoreError(f"vCPU state: {error}") from error
