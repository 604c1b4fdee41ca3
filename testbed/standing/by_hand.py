"""What can be done by hand with standing hosts: migrations onward and back, faults, a look at everything.

Rule 1: every step is the one that a run takes, and is recorded as a run records it.
Rule 2: after a migration the guest is checked where it is, and then runs on there, whatever came of it; the host
        that it left is made ready to take it back.
Rule 3: a fault in force has a number; it is healed by that number, or when the session ends, whichever is first.
Rule 4: a look is short: a host that does not answer within LOOK_S is told as such, and the rest is shown.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from testbed.errors import MachineCannotError, RunBrokenError, UsageError
from testbed.faults.errors import FaultError
from testbed.faults.fault import Applied, Fault, Target, apply, parse_fault, ports_of
from testbed.host_handles import SHORT_NAMES
from testbed.record.run_dir import write_json
from testbed.scenario.document import Scenario
from testbed.scenario.file import problem_of, set_key, split_override, validate
from testbed.scenario.leg_keys import ORIGINS, Leg
from testbed.standing.resolve import resolve
from testbed.standing.sessions import manifest_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from testbed.host_handles import Host
    from testbed.interrupt import Interrupt
    from testbed.run.session import Session

LOOK_S: Final = 2.0  # a host that does not say its state within this is shown as silent
GUEST_STATES: Final = ("running", "paused")  # of a host that has the guest
SCHEDULE_KEYS: Final = ("at", "for", "leg")
BY_HAND: Final = "by hand"
OVERRIDE_SECTION: Final = "migration."
OUTCOMES: Final = ("completed", "rehearsal", "cancelled", "failed", "guest_lost")


@dataclass(frozen=True, slots=True)
class InForce:
    """A fault that was added and is not healed."""

    number: int
    fault: Fault
    applied: Applied

    def describe(self) -> dict[str, Any]:
        """For a table."""
        parameters = self.fault.model_dump(mode="json", exclude={"kind", "at", "lasting_ms", "leg", "host"})
        return {
            "id": self.number, "kind": self.fault.kind, "host": SHORT_NAMES[self.fault.origin],
            "parameters": parameters,
        }  # fmt: skip


class ByHand:
    """The hands of one standing session. Methods may be called by different threads."""

    def __init__(self, session: Session, interrupt: Interrupt) -> None:
        self._session = session
        self._interrupt = interrupt
        manifest = manifest_of(session.run_dir)
        self._scenario = Scenario.model_validate(manifest["scenario"])
        self._run = str(manifest["run"])
        self._legs: list[Leg] = []
        self._faults: dict[int, InForce] = {}
        self._fault_number = len(self._scenario.fault)  # the scenario's own come first
        self._faults_lock = threading.Lock()

    @property
    def legs_made(self) -> int:
        """Migrations so far."""
        return len(self._legs)

    # -- migrations ----------------------------------------------------------------------------

    def migrate(self, to: str | None, overrides: Sequence[str], expect: str) -> dict[str, Any]:
        """One migration, and what came of it. Raises UsageError, RunBrokenError."""
        session = self._session
        leg = self._leg(to, overrides)
        if expect not in OUTCOMES:
            raise UsageError(f"--expect {expect!r} is none of {', '.join(OUTCOMES)}")
        self._legs.append(leg)
        self._write_legs()
        number = len(self._legs)
        outcome = session.make_leg(number, leg, expect=expect)
        if outcome != "guest_lost":
            try:
                session.go_on()
            except (
                RunBrokenError
            ) as error:  # a host that a fault killed: told, seen in the status, and judged
                session.history.note("cannot_go_on", host=session.here, reason=str(error))
        return {"session": str(session.run_dir.path), "leg": number, "outcome": outcome}

    def measure_dirty_rate(self, period_ms: int, periods: int) -> dict[str, Any]:
        """How the guest writes, where it is. Raises RunBrokenError."""
        host = self._session.hosts.hosts[self._session.here]
        return {"reply": MessageToDict(host.client.measure_dirty_rate(period_ms, periods))}

    def cancel(self) -> dict[str, Any]:
        """Asks the migration under way to stop. Raises RunBrokenError when there is none."""
        return self._session.cancel("cancelled by the user")

    def resolve(self, dead: str, fenced: str) -> dict[str, Any]:
        """Ends an attempt whose other side will never return. Raises UsageError, RunBrokenError."""
        if dead not in ("source", "dest"):
            raise UsageError(f"--dead {dead!r}: source or dest, of the newest migration")
        if not self._legs:
            raise UsageError("no migration was made in this session: there is nothing to resolve")
        session = self._session
        giver, taker = session.parties
        done = resolve(
            session.run_dir, giver, taker, dead="source" if dead == "source" else "dest", fenced=fenced
        )
        session.history.note("resolved_by_hand", dead=dead, fenced=fenced, **done)
        if dead == "source" and done["verdict"] == "COMMITTED":
            session.moved(taker.origin)
        return {"session": str(session.run_dir.path), "dead": dead, **done}

    def last_look(self) -> None:
        """Before the end: the guest checks itself where it is; that it cannot is told, and judged."""
        session = self._session
        session.history.note("session_ends", host=session.here)
        try:
            session.check_guest()
        except RunBrokenError as error:
            session.history.note("guest_unchecked", host=session.here, reason=str(error))

    def _leg(self, to: str | None, overrides: Sequence[str]) -> Leg:
        here = SHORT_NAMES[self._session.here]
        hosts = sorted(SHORT_NAMES[origin] for origin in self._session.hosts.hosts)
        there = [host for host in hosts if host != here]
        chosen = to or there[0]
        if chosen == here:
            raise UsageError(f"the guest is on {here} already: --to {' or '.join(there)}")
        if chosen not in ORIGINS or chosen not in there:
            raise UsageError(f"--to {chosen!r}: this session has {' and '.join(hosts)}")
        document = self._scenario.model_dump(mode="json", exclude={"leg"})
        for override in overrides:
            key, value = split_override(override)
            if not key.startswith(OVERRIDE_SECTION):
                raise UsageError(
                    f"{key}: only keys of [migration] can differ in a standing session; the rest was fixed by `up`"
                )
            set_key(document, key, value)
        changed, problems = validate(document)
        if changed is None:
            raise UsageError(*problems)
        return Leg.model_validate({**changed.migration.model_dump(), "to": chosen})

    def _write_legs(self) -> None:
        """Rule 4 of the keeper: the manifest names the legs that were made."""
        run_dir = self._session.run_dir
        manifest = manifest_of(run_dir)
        manifest["scenario"]["leg"] = [leg.model_dump(mode="json") for leg in self._legs]
        write_json(run_dir.manifest, manifest)

    # -- faults --------------------------------------------------------------------------------

    def add_fault(self, kind: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Brings a fault into force. Raises UsageError, MachineCannotError, RunBrokenError."""
        scheduled = [key for key in SCHEDULE_KEYS if key in parameters]
        if scheduled:
            raise UsageError(
                f"{scheduled[0]}: a fault added by hand acts at once and until `ballast fault heal`; "
                "schedules are for [[fault]] in a scenario"
            )
        try:
            fault = parse_fault(kind, parameters)
        except ValidationError as error:
            raise UsageError(*(_explained(kind, problem) for problem in error.errors())) from error
        problems = [f"fault {kind}: {key}: {problem}" for key, problem in fault.conflicts()]
        if problems:
            raise UsageError(*problems)
        self._refuse_what_cannot_be(fault)
        hosts = self._session.hosts.hosts
        if fault.restarts:  # its end is no reason to give up: healing starts it again
            self._session.expect_back(frozenset({fault.restarts}))
        with self._faults_lock:
            self._fault_number += 1
            number = self._fault_number
            label = f"ballast-{self._run}-{number}"
            target = Target(hosts, fault.origin, label, self._scenario.seed + number, ports_of(hosts))
            try:
                applied = apply(fault, target)
            except FaultError as error:
                raise RunBrokenError(f"fault {kind}: {error}") from error
            in_force = self._faults[number] = InForce(number, fault, applied)
        parameters = in_force.describe()["parameters"]
        self._session.history.note(
            "fault_applied",
            fault=number, kind=kind, host=fault.origin, at=BY_HAND, parameters=parameters,
        )  # fmt: skip
        return {"session": str(self._session.run_dir.path), "fault": in_force.describe()}

    def heal_fault(self, number: int, why: str = BY_HAND) -> dict[str, Any]:
        """Undoes it. Raises UsageError, RunBrokenError."""
        with self._faults_lock:
            in_force = self._faults.get(number)
            if in_force is None:
                known = ", ".join(str(known) for known in self._faults) or "none"
                raise UsageError(f"no fault {number} is in force (in force: {known})")
            try:
                later = [one.applied for other, one in self._faults.items() if other > number]
                counted = in_force.applied.heal(self._session.hosts.hosts, later)
            except FaultError as error:
                raise RunBrokenError(
                    f"fault {in_force.fault.kind}: it could not be healed: {error}"
                ) from error
            del self._faults[number]
        fault = in_force.fault
        self._session.history.note(
            "fault_healed", fault=number, kind=fault.kind, host=fault.origin, why=why, **counted
        )
        return {"fault": in_force.describe(), "counted": counted}

    def heal_all(self) -> None:
        """At the end of the session; what cannot be healed is told, and the rest is."""
        for number, in_force in list(self._faults.items()):
            kind = in_force.fault.kind
            if not in_force.fault.heals_at_the_end:
                self._faults.pop(number)
                continue
            try:
                self.heal_fault(number, "the session ends")
            except RunBrokenError as error:
                self._session.history.note("fault_failed", fault=number, kind=kind, reason=str(error))
                self._faults.pop(number, None)

    def _refuse_what_cannot_be(self, fault: Fault) -> None:
        host = self._session.hosts.hosts.get(fault.origin)
        if host is None:
            known = ", ".join(self._session.hosts.hosts)
            raise UsageError(f"fault {fault.kind}: there is no host {fault.origin!r} here, only {known}")
        if fault.rebuilds_network and self._scenario.link.shaped:
            raise UsageError(
                f"fault {fault.kind} makes a new interface, which would lack what [link] says: "
                "leave [link] out and add its faults by hand"
            )
        if fault.scope == "network" and host.network_pid is None:
            raise MachineCannotError(
                f"fault {fault.kind} needs hosts with a network of their own: `ballast up --hosts docker`"
            )
        if fault.scope == "container" and host.container is None:
            raise MachineCannotError(f"fault {fault.kind} needs containers: `ballast up --hosts docker`")
        if lacks := type(fault).lacks():
            raise MachineCannotError(f"fault {fault.kind}: {lacks}")

    # -- a look --------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Hosts, guest, balloon, faults, migrations; plain JSON."""
        session = self._session
        return {
            "session": str(session.run_dir.path),
            "scenario": self._scenario.name,
            "hosts_kind": self._scenario.hosts.kind,
            "hosts": [self._look(host) for host in sorted(session.hosts.hosts.values(), key=_short_name)],
            "faults": [in_force.describe() for in_force in self._faults.values()],
            "migrations": [
                {"leg": event.fields["leg"], "outcome": event.fields["outcome"]}
                for event in session.history.having("leg_ended")
            ],
        }

    def _look(self, host: Host) -> dict[str, Any]:
        seen: dict[str, Any] = {
            "host": SHORT_NAMES[host.origin], "origin": host.origin,
            "node_pid": host.node.pid, "node_alive": host.node.alive,
            "agent_pid": host.agent.pid, "agent_alive": host.agent.alive,
            "address": host.migration_address, "guest": "unknown", "has_guest": False,
        }  # fmt: skip
        if not host.node.alive:
            return {**seen, "guest": "the node is dead", "problem": host.node.last_words()}
        try:
            status = host.client.guest_status(LOOK_S)
        except RunBrokenError as error:
            return {**seen, "problem": str(error)}
        return {
            **seen,
            "guest": status.state,
            "has_guest": status.state in GUEST_STATES,
            "guest_epoch": status.guest_epoch,
            "pages": status.pages,
            "free_pages": status.free_pages,
            "balloon_target_pages": status.num_pages,
            "balloon_pages": status.actual,
            "held_pages": status.held_pages,
            "operations": status.operations,
        }


def _explained(kind: str, problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "parameters"
    message = problem_of(problem)
    if problem["type"] == "extra_forbidden":
        message = "there is no such parameter"
    elif place == "host":
        message = f"{problem['input']!r} is no host: {', '.join(sorted(SHORT_NAMES.values()))}"
    return f"fault {kind}: {place}: {message} (docs/faults/{kind}.md)"


def _short_name(host: Host) -> str:
    return SHORT_NAMES[host.origin]
