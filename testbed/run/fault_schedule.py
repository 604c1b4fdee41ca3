"""The faults of one run: each brought into force at its moment, healed when its time is over or the run ends.

Rule 1: a moment is an event of the history; a node that comes to the point of a fault waits there until the fault
        is in force, so that the schedule is exact; one that the fault itself stops is let go on when it is healed.
        Times count from the request to migrate. With `leg` it is that leg's moment, else the first that comes.
Rule 2: whatever happened, everything is healed before the hosts are taken down; the last one first.
Rule 3: every fault applied or healed is in the history; one that cannot be, whatever the reason, is `fault_failed`
        and breaks the run. The thread goes on: the others are healed in time.
Rule 4: one thread does it all; who records an event only posts it here.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, Self

import structlog

from host.points import side_of
from testbed.clock import now_ns
from testbed.errors import MachineCannotError, RunBrokenError, TestbedError
from testbed.faults.fault import Applied, Port, Target, apply, ports_of
from testbed.faults.parameters import moment_ms
from testbed.faults.pause import Pause
from testbed.record.leg_views import leg_path
from testbed.run.shaped_link import ShapedLink
from testbed.scenario.leg_keys import ORIGINS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from testbed.faults.fault import Fault
    from testbed.history import Event, History, Origin
    from testbed.host_handles import Hosts
    from testbed.scenario.document import Scenario

HOLD_MS: Final = 30_000  # a node waits no longer for a fault; bringing one into force takes a second at most
# A node that stands still does not answer; nothing else is healed or applied meanwhile.
RELEASE_S: Final = 1.0
IDLE_S: Final = 3600.0  # no fault is due: only an event or the end wakes it

log = structlog.get_logger()


class Schedule:
    """A context manager around the session. Raises RunBrokenError on leaving when a fault failed."""

    def __init__(self, scenario: Scenario, run_id: str, *, hosts: Hosts, history: History) -> None:
        self._faults: Sequence[Fault] = scenario.fault
        self._path = [(ORIGINS[giver], ORIGINS[taker]) for giver, taker in leg_path(scenario.legs)]
        self._leg = 1  # under way
        self._hosts = hosts
        self._history = history
        self._seed = scenario.seed
        self._label = f"ballast_{run_id}"
        self._link = ShapedLink(
            scenario.link, hosts.hosts, history, label=self._label, seed=self._seed_of("link")
        )
        self._posted: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # bounded: the run's own history
        self._waiting = set(range(len(self._faults)))  # not yet applied
        self._in_force: dict[int, tuple[Applied, int | None]] = {}  # -> and when it is to be healed, in ns
        self._due_ns: dict[int, int] = {}  # of those with a time, once the migration was requested
        self._stopped: dict[int, tuple[Origin, str]] = {}  # -> whom a fault stopped at its point
        # bounded: one for each point. Who did not hear that it may go on: it is told once more after every heal
        self._unheard: set[tuple[Origin, str]] = set()
        self._failure = ""
        self._thread = threading.Thread(target=self._main, name="faults", daemon=True)

    def __enter__(self) -> Self:
        for fault in self._faults:
            if fault.scope == "network" and Port.of(self._hosts.hosts[fault.origin]) is None:
                raise MachineCannotError(
                    f"{fault.kind}: the network of the {fault.origin} is not on this machine"
                )
        self._link.apply()
        with ExitStack() as undoing:
            undoing.callback(self._link.heal)
            self._arm()
            undoing.pop_all()
        if self._faults:
            self._history.subscribe(self._posted.put)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.ident is not None:
            self._posted.put(None)
            self._thread.join()  # ends: with the fault under way
        with ExitStack() as healing:
            healing.callback(self._link.heal)
            for number in self._in_force.copy():
                healing.callback(self._heal, number, "the run ends")
        if self._failure and error is None:
            raise RunBrokenError(self._failure)

    # -- moments -------------------------------------------------------------------------------

    def _arm(self) -> None:
        for origin, point in self._places():
            self._hosts.hosts[origin].client.arm_point(point, HOLD_MS)

    def _places(self) -> set[tuple[Origin, str]]:
        """Of the faults that wait for a point: the host whose node comes to it, and that point."""
        waiting = (self._faults[number] for number in self._waiting)
        return {self._place_of(fault) for fault in waiting if moment_ms(fault.at) is None}

    def _place_of(self, fault: Fault) -> tuple[Origin, str]:
        giver, taker = self._path[(fault.leg or 1) - 1]
        return (giver if side_of(fault.at) == "source" else taker), fault.at

    def _may_come(self, number: int) -> bool:
        return self._faults[number].leg in (None, self._leg)

    def _main(self) -> None:
        try:
            self._follow()
        except Exception as error:
            log.exception("fault_schedule_failed")
            words = " ".join(str(error).split()) or type(error).__name__
            self._failure = self._failure or f"the schedule of the faults ended: {words}"

    def _follow(self) -> None:
        while True:
            try:
                event = self._posted.get(timeout=self._next_s())
            except queue.Empty:
                self._look_at_the_clock()
                continue
            if event is None:
                return
            if event.name == "leg_started":
                self._leg = int(event.fields["leg"])
            elif event.name == "migration_requested":
                self._requested(event.at_ns)
            elif event.name == "point_reached":
                self._reached(event)
            self._look_at_the_clock()

    def _requested(self, at_ns: int) -> None:
        """The clock of the faults with a time begins; a further attempt does not set it back."""
        for number in self._waiting - self._due_ns.keys():
            at_ms = moment_ms(self._faults[number].at)
            if at_ms is not None and self._may_come(number):
                self._due_ns[number] = at_ns + at_ms * 1_000_000

    def _next_s(self) -> float:
        instants = [*self._due_ns.values(), *(end for _, end in self._in_force.values() if end is not None)]
        return max(0.0, (min(instants) - now_ns()) / 1e9) if instants else IDLE_S

    def _look_at_the_clock(self) -> None:
        instant = now_ns()
        for number in [number for number, at_ns in self._due_ns.items() if at_ns <= instant]:
            del self._due_ns[number]
            self._apply(number)
        for number, (_, end_ns) in self._in_force.copy().items():
            if end_ns is not None and end_ns <= now_ns():
                self._heal(number, "its time is over")

    def _reached(self, event: Event) -> None:
        point = str(event.fields["point"])
        stopped = False
        for number in sorted(self._waiting):
            if (fault := self._faults[number]).at == point and self._may_come(number):
                self._apply(number)
                if (
                    number in self._in_force
                    and isinstance(fault, Pause)
                    and fault.stops_node_of(event.origin)
                ):
                    self._stopped[number] = (event.origin, point)
                    stopped = True
        if not stopped:
            self._let_go_on(event.origin, point)

    def _let_go_on(self, origin: Origin, point: str) -> None:
        host = self._hosts.hosts.get(origin)
        if host is None or not host.node.alive:
            return
        try:
            host.client.release_point(point, RELEASE_S)
            if (origin, point) in self._places():
                host.client.arm_point(point, HOLD_MS)  # of a later leg: a point holds whom it meets once
        except RunBrokenError as error:  # it stands still, and is told again when something is healed
            self._unheard.add((origin, point))
            self._history.note("release_unheard", host=origin, point=point, reason=str(error))

    # -- faults --------------------------------------------------------------------------------

    def _apply(self, number: int) -> None:
        fault = self._faults[number]
        self._waiting.discard(number)
        hosts = self._hosts.hosts
        label = f"{self._label}_fault{number}"
        target = Target(hosts, fault.origin, label, self._seed_of(str(number)), ports_of(hosts))
        try:
            applied = apply(fault, target)
        except (TestbedError, OSError) as error:
            self._failed(number, "could not be brought into force", error)
            return
        except Exception as error:
            log.exception("fault_failed", fault=number)
            self._failed(number, "could not be brought into force", error)
            return
        end_ns = None if fault.lasting_ms is None else now_ns() + fault.lasting_ms * 1_000_000
        self._in_force[number] = (applied, end_ns)
        self._history.note(
            "fault_applied",
            fault=number,
            kind=fault.kind,
            host=fault.origin,
            at=fault.at,
            **({"leg": self._leg} if len(self._path) > 1 else {}),
            parameters=fault.model_dump(mode="json", exclude={"kind", "at", "host", "leg", "lasting_ms"}),
        )

    def _heal(self, number: int, why: str) -> None:
        order = list(self._in_force)
        later = [self._in_force[other][0] for other in order[order.index(number) + 1 :]]
        applied, _ = self._in_force.pop(number)
        fault = self._faults[number]
        if why == "the run ends" and not fault.heals_at_the_end:
            return
        try:
            counted = applied.heal(self._hosts.hosts, later)
            if fault.rebuilds_network:
                self._link.renew(fault.origin)
        except (TestbedError, OSError) as error:
            self._failed(number, "could not be healed", error)
            return
        except Exception as error:
            log.exception("fault_failed", fault=number)
            self._failed(number, "could not be healed", error)
            return
        finally:
            waiting, self._unheard = self._unheard, set()
            if (held := self._stopped.pop(number, None)) is not None:
                waiting.add(held)
            for origin, point in sorted(waiting):
                self._let_go_on(origin, point)
        self._history.note(
            "fault_healed", fault=number, kind=fault.kind, host=fault.origin, why=why, **counted
        )

    def _failed(self, number: int, what: str, error: Exception) -> None:
        fault = self._faults[number]
        words = " ".join(str(error).split()) or type(error).__name__
        reason = f"the fault {fault.kind} (fault.{number}) {what}: {words}"
        self._failure = self._failure or reason
        self._history.note("fault_failed", fault=number, kind=fault.kind, reason=reason)

    def _seed_of(self, name: str) -> int:
        """Each fault's dice are its own: another fault shifts nobody's."""
        digest = hashlib.sha256(f"{self._seed}/faults/{name}".encode()).digest()
        return int.from_bytes(digest[:6], "little")
