"""One run's way: the guest boots; leg by leg it settles, migrates, runs on, is stopped and asked what it remembers.

Rule 1: every step is a fact in the history before the next one is taken.
Rule 2: whatever became of the migration, the guest is checked where it is, and the evidence is collected.
Rule 3: the first Ctrl-C cancels the migration and waits for its outcome; the second gives up waiting.
Rule 4: a silence has a deadline; a process that dies ends the wait that needed it.
Rule 5: a leg is complete, evidence and all, before the next one begins; only then does the host that gave the
        guest away let go of it, and the guest run on. A leg that did not complete is the last one.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from testbed.errors import InterruptedRunError, RunBrokenError
from testbed.record.leg_views import OracleChain, artefact_name
from testbed.record.oracle_log import RECORD_BYTES, last_versions
from testbed.run.attempts import Attempts
from testbed.scenario.fault_keys import restarted
from testbed.scenario.leg_keys import ORIGINS
from testbed.scenario.migration_keys import migrate_request
from virtio.balloon import F_STATS_VQ, has

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from migration.pb import node_pb2
    from testbed.history import Event, History, Origin
    from testbed.host_handles import Host, Hosts
    from testbed.interrupt import Interrupt
    from testbed.record.run_dir import RunDir
    from testbed.scenario.document import Scenario
    from testbed.scenario.leg_keys import Leg
    from testbed.scenario.migration_keys import Migration

READY_S: Final = 60.0  # four processes start in seconds, on a loaded machine in tens
READY_S_PER_GIB: Final = (
    60.0  # workloads fill memory at its first touch, well above 100 MB/s even when shared
)
OUTCOME_S: Final = 60.0  # beyond the migration's own timeout: hashing both RAMs, recording, answering
OUTCOME_S_PER_GIB: Final = 20.0
ROUNDS_AFTER_TIMEOUT: Final = 2  # of a migration that switches when it is out of time
NO_TIMEOUT_S: Final = 3600.0  # of a migration without a timeout of its own: a run ends nevertheless
RUNNING_S: Final = 30.0  # COMMITTED is answered when the guest runs: its event follows
BALLOON_S: Final = 60.0  # a driver inflates a GiB in a second
CHECK_S: Final = 300.0  # of a self-check: some GiB a second, on a loaded machine a tenth of it
STAND_BY_S: Final = 120.0  # unmapping the guest's RAM, some GiB a second
ARTEFACT_S: Final = 120.0  # files of 8 bytes a page
LOOK_S: Final = 0.02  # between two looks for a state


class Session:
    """Drives the started hosts through one scenario."""

    def __init__(
        self,
        scenario: Scenario,
        migration: str,
        *,
        hosts: Hosts,
        run_dir: RunDir,
        history: History,
        interrupt: Interrupt,
    ) -> None:
        self._scenario = scenario
        self._migration = migration
        self._hosts = hosts
        self._run_dir = run_dir
        self._history = history
        self._interrupt = interrupt
        self._restarted = restarted(scenario.fault)  # by faults that kill: their end is no reason to give up
        self._gib = scenario.guest.memory / 2**30
        self._giver: Host = hosts.source
        self._taker: Host = hosts.dest
        self._here: Origin = "source"  # where the guest is after the last leg
        self._ran: Sequence[Event] = ()  # what the earlier legs' takers told
        self._oracle = OracleChain(scenario.origins, run_dir.artefact)
        self._attempts = Attempts(history)

    def run(self) -> None:
        """The whole way. Raises RunBrokenError or InterruptedRunError where it cannot go on."""
        self._boot()
        self._inflate()
        for number, leg in enumerate(self._scenario.legs, start=1):
            if number > 1:
                self.go_on()
            if self.make_leg(number, leg) != "completed":
                break

    @property
    def hosts(self) -> Hosts:
        """The started hosts."""
        return self._hosts

    @property
    def history(self) -> History:
        """What has happened."""
        return self._history

    @property
    def run_dir(self) -> RunDir:
        """Where it is recorded."""
        return self._run_dir

    @property
    def here(self) -> Origin:
        """The host that the guest is on, as far as is known."""
        return self._here

    @property
    def parties(self) -> tuple[Host, Host]:
        """Who gives the guest and who takes it, in the newest leg."""
        return self._giver, self._taker

    def cancel(self, reason: str) -> dict[str, Any]:
        """Asks the migration under way to stop, and makes no other attempt; from any thread.

        Raises RunBrokenError: there is none, or its source does not answer.
        """
        return self._attempts.cancel(self._hosts.hosts[self._here].client, reason)

    def moved(self, origin: Origin) -> None:
        """The guest is there: an operator said so, and the node agreed."""
        self._here = origin

    def go_on(self) -> None:
        """The guest, which was checked, runs on where the last leg left it; where it came from is room again.

        Raises RunBrokenError: one of the two did not come about; `guest_resumed` is noted when the guest runs.
        """
        left, self._giver = self._giver, self._hosts.hosts[self._here]
        try:
            if left is not self._giver and left.agent.alive:  # a dead agent holds nothing to be let go of
                left.client.stand_by(STAND_BY_S)
        finally:  # the guest's host is another: whatever became of the one that it left, it runs on
            self._giver.client.resume_guest()
            self._history.note("guest_resumed", host=self._here)

    def check_guest(self) -> None:
        """The guest checks itself where it is, and stands still afterwards. Raises as `run`."""
        owner = self._hosts.hosts[self._here]
        self._giver = owner
        self._taker = next(host for host in self._hosts.hosts.values() if host is not owner)
        self._check_where_it_is(owner)

    def expect_back(self, processes: frozenset[str]) -> None:
        """These may end: whoever ends them starts them again, or means it."""
        self._restarted |= processes

    def make_leg(
        self, number: int, leg: Leg, *, expect: str = "", meanwhile: Callable[[], None] = lambda: None
    ) -> str:
        """One migration, and everything that is kept of it; its outcome. Raises as `run`.

        `meanwhile` is called when the outcome is known, before anybody looks at the hosts.
        """
        self._taker = self._hosts.hosts[ORIGINS[leg.to]]
        if self._scenario.leg:
            parties = {"giver": self._giver.origin, "taker": self._taker.origin}
            self._history.note("leg_started", leg=number, **parties, **({"expect": expect} if expect else {}))
        settle_ms = self._scenario.run.settle if leg.settle is None else leg.settle
        self._interrupt.pause(settle_ms / 1000)
        self._unless_interrupted()
        ended = self._migrate(number, leg)
        meanwhile()
        outcome = str(ended.fields["outcome"])
        if outcome == "completed" and self._died_after_commit():
            outcome = "guest_lost"
        owner = self._owner_after(outcome)
        if owner is not None:
            self._check_where_it_is(owner)
        self._collect(number, leg, ended, outcome)
        self._note_final_states()
        self._hosts.collect()
        sizes = self._oracle.leg_ended(self._giver.origin, self._taker.origin)
        if self._scenario.leg:
            self._history.note("leg_ended", leg=number, outcome=outcome, oracle_bytes=sizes)
        self._here = owner.origin if owner is not None else self._giver.origin
        return outcome

    def settle(self) -> None:
        """The guest boots, inflates its balloon and works for a while. Raises as `run`."""
        self._boot()
        self._inflate()
        self._interrupt.pause(self._scenario.run.settle / 1000)
        self._unless_interrupted()

    def measure_dirty_rate(self, period_ms: int, periods: int) -> node_pb2.DirtyRateReply:
        """Of the settled guest. Raises as `run`."""
        self.settle()
        return self._hosts.source.client.measure_dirty_rate(period_ms, periods)

    def _boot(self) -> None:
        self._await(
            lambda event: event.origin == "source" and event.name == "guest_ready",
            READY_S + READY_S_PER_GIB * self._gib,
            "the guest to boot and set its workloads up",
            needs=("source-node", "source-agent"),
        )
        for host in self._hosts.hosts.values():
            if host is not self._hosts.source:
                self._await_state(host, "standby", RUNNING_S)

    def _inflate(self) -> None:
        pages = self._scenario.balloon.num_pages
        if not pages:
            return
        source = self._hosts.source.client
        source.set_balloon(pages)
        self._history.note("balloon_set", num_pages=pages)
        self._poll(lambda: source.guest_status().actual == pages, BALLOON_S, "the balloon to inflate")
        self._history.note("balloon_inflated", actual=pages)

    def _migrate(self, number: int, leg: Leg) -> Event:
        self._note_guest(self._giver, "guest_status")
        before = self._cpu_seconds()
        migration = f"{self._migration}.{number}" if self._scenario.leg else self._migration
        self._attempts.begin()
        attempt = 1
        ended = self._make_attempt(leg, migration, attempt)
        while self._attempts.another_follows(leg, attempt, ended):
            self._unless_interrupted()
            attempt += 1
            ended = self._make_attempt(leg, migration, attempt)
        after = self._cpu_seconds()
        self._history.note("cpu_used", **{part: max(0.0, after[part] - before[part]) for part in before})
        return ended

    def _make_attempt(self, leg: Leg, migration: str, attempt: int) -> Event:
        request = migrate_request(
            leg,
            migration=migration,
            attempt=attempt,
            dest_address=self._taker.migration_address,
            dest_server_name=self._taker.server_name,
            rehearsal=self._scenario.rehearses,
        )
        earlier = self._history.having("migration_ended")
        self._history.note("migration_requested", migration=migration, attempt=attempt)
        self._giver.client.migrate(request)
        self._attempts.requested(self._giver.client)
        return self._await_outcome(leg, earlier)

    def _await_outcome(self, leg: Leg, earlier: Sequence[Event]) -> Event:
        limit_s = outcome_limit_s(leg, self._scenario)
        outcome = partial(_is_new, "migration_ended", self._giver.origin, earlier)
        needs = (f"{self._giver.origin}-node",)
        try:
            return self._await(outcome, limit_s, "the migration's outcome", needs=needs)
        except InterruptedRunError:
            reason = "interrupted by the user"
        except RunBrokenError:
            if not self._giver.node.alive:
                raise
            reason = f"no outcome within {limit_s:.0f} s"
        self._attempts.cancel(self._giver.client, reason)
        return self._await(
            outcome, self._grace_s, "the cancelled migration's outcome", needs=needs, cancelled=True
        )

    @property
    def _grace_s(self) -> float:
        return _grace_s(self._scenario)

    def _owner_after(self, outcome: str) -> Host | None:
        if outcome == "guest_lost":
            return None
        if outcome != "completed":
            self._await_state(self._giver, "running", RUNNING_S)
            return self._giver
        origin = self._taker.origin
        self._await(
            partial(_is_new, "guest_running", origin, self._ran),
            RUNNING_S,
            "the guest to run at the destination",
            needs=(f"{origin}-node", f"{origin}-agent"),
            cancelled=True,
        )
        self._ran = self._history.having("guest_running")
        return self._taker

    def _died_after_commit(self) -> bool:
        """Whether the guest was handed over, and its process there has ended since: there is no other."""
        origin = self._taker.origin
        running, lost = partial(_is_new, "guest_running", origin, self._ran), f"{origin}-agent"

        def known(event: Event) -> bool:
            return running(event) or (event.name == "process_ended" and event.fields["process"] == lost)

        self._history.wait_for(known, RUNNING_S)
        if self._taker.agent.alive:
            return False
        self._history.note("guest_lost", host=origin, reason=f"the {origin} agent died with the guest")
        return True

    def _check_where_it_is(self, owner: Host) -> None:
        self._interrupt.pause_unless_hurried(self._scenario.run.run_on / 1000)
        self._note_guest(owner, "guest_ran_on")
        owner.client.pause_guest()
        self._hosts.collect()
        expected = last_versions(self._oracle.logged(self._giver.origin, self._taker.origin))
        checked = owner.client.check_guest(expected, CHECK_S)
        self._history.note(
            "guest_checked",
            host=owner.origin,
            ok=checked.ok,
            problems=list(checked.problems),
            checked_items=checked.checked_items,
            expected_items=len(expected) // RECORD_BYTES,
        )

    def _collect(self, number: int, leg: Leg, ended: Event, outcome: str) -> None:
        wanted = [(self._giver, str(name)) for name in ended.fields.get("artefacts", ())]
        verified = outcome in ("completed", "rehearsal")
        if verified and leg.integrity == "full":
            wanted.append((self._taker, "dest_hashes"))
        for host, name in wanted:
            kept = artefact_name(name, number if self._scenario.leg else 0)
            try:
                host.client.save_artefact(name, self._run_dir.artefact(kept), ARTEFACT_S)
            except RunBrokenError as error:
                if host.node.name not in self._restarted:
                    raise
                # What it had read back died with the process that a fault killed: a judge sees that it is gone.
                self._history.note("artefact_missing", host=host.origin, artefact=name, reason=str(error))

    def _note_final_states(self) -> None:
        for host in self._hosts.hosts.values():
            if host.node.alive and host.agent.alive:
                status = host.client.guest_status()
                state, epoch = status.state, status.guest_epoch
            else:
                state, epoch = "dead", 0
            self._history.note("final_status", host=host.origin, state=state, guest_epoch=epoch)

    def _note_guest(self, host: Host, name: str) -> None:
        status = self._status_with_stats(host)
        self._history.note(
            name,
            host=host.origin,
            state=status.state,
            guest_epoch=status.guest_epoch,
            pages=status.pages,
            free_pages=status.free_pages,
            ballooned_pages=status.ballooned_pages,
            held_pages=status.held_pages,
            operations=status.operations,
            balloon=json.loads(status.balloon_json or "{}"),
        )

    def _status_with_stats(self, host: Host) -> node_pb2.GuestStatusReply:
        """A guest's status with statistics of now, where its driver has any."""
        status = host.client.guest_status()
        if not _answers_stats(json.loads(status.balloon_json or "{}")):
            return status
        try:
            host.client.refresh_stats()
        except RunBrokenError as error:  # no reason to give a run up
            self._history.note("guest_stats_missing", host=host.origin, reason=str(error))
        return host.client.guest_status()

    def _cpu_seconds(self) -> dict[str, float]:
        """CPU time so far of both nodes of the leg, and of the guest's two agents together."""
        source, dest = self._giver, self._taker
        return {
            "source": source.node.cpu_seconds(),
            "dest": dest.node.cpu_seconds(),
            "guest": source.agent.cpu_seconds() + dest.agent.cpu_seconds(),
        }

    def _unless_interrupted(self) -> None:
        if self._interrupt.pressed:
            raise InterruptedRunError("interrupted before the migration")

    def _await_state(self, host: Host, state: str, timeout_s: float) -> None:
        self._poll(
            lambda: host.client.guest_status().state == state,
            timeout_s,
            f"the {host.origin}'s guest to be {state}",
        )

    def _poll(self, is_so: Callable[[], bool], timeout_s: float, what: str) -> None:
        """For states that no event announces. A dead node ends it: its calls fail."""
        for _ in range(round(timeout_s / LOOK_S)):
            if is_so():
                return
            self._interrupt.pause_unless_hurried(LOOK_S)
        raise RunBrokenError(f"waited {timeout_s:.0f} s in vain for {what}")

    def _await(
        self,
        matches: Callable[[Event], bool],
        timeout_s: float,
        what: str,
        *,
        needs: tuple[str, ...],
        cancelled: bool = False,
    ) -> Event:
        """The event that matches. `needs` names the processes without which there is no point in waiting."""

        def stops(event: Event) -> bool:
            if matches(event):
                return True
            if event.name == "process_ended":
                process = event.fields["process"]
                comes_back = process in self._restarted or self._is_back(process)
                return process in needs and not comes_back
            if event.name == "fault_failed":
                return True
            return self._interrupt.hurried if cancelled else event.name == "interrupted"

        event = self._history.wait_for(stops, timeout_s)
        if event is None:
            raise RunBrokenError(f"waited {timeout_s:.0f} s in vain for {what}")
        if matches(event):
            return event
        if event.name == "process_ended":
            raise RunBrokenError(_obituary(event))
        if event.name == "fault_failed":
            raise RunBrokenError(str(event.fields["reason"]))
        raise InterruptedRunError(f"interrupted while waiting for {what}")

    def _is_back(self, process: str) -> bool:
        """Whether a process that ended was started again since, as the healer of a fault does."""
        origin, _, part = process.partition("-")
        host = next((host for host in self._hosts.hosts.values() if host.origin == origin), None)
        handle = None if host is None else host.node if part == "node" else host.agent
        return handle is not None and handle.alive


def outcome_limit_s(leg: Migration, scenario: Scenario) -> float:
    """How long a migration may take until its outcome is told, before the testbed cancels it.

    With `on_timeout = "switch"` the engine sends the round under way and the last one to their ends: each may be
    all of memory, at the rate that the scenario allows, and the link may be away for `link_timeout`.
    """
    limit_s = (leg.timeout / 1000 or NO_TIMEOUT_S) + _grace_s(scenario)
    if leg.on_timeout != "switch":
        return limit_s
    rates = [rate for rate in (leg.bandwidth, scenario.link.rate) if rate]
    sending_s = ROUNDS_AFTER_TIMEOUT * scenario.guest.memory / min(rates) if rates else 0.0
    return limit_s + sending_s + leg.link_timeout / 1000


def _grace_s(scenario: Scenario) -> float:
    return OUTCOME_S + OUTCOME_S_PER_GIB * scenario.guest.memory / 2**30


def _answers_stats(balloon: dict[str, Any]) -> bool:
    return bool(balloon.get("ready")) and has(int(balloon.get("features", 0)), F_STATS_VQ)


def _is_new(name: str, origin: Origin, earlier: Sequence[Event], event: Event) -> bool:
    """Whether the event is another one than what the same host told in an earlier leg."""
    return event.origin == origin and event.name == name and not any(event is old for old in earlier)


def _obituary(event: Event) -> str:
    words = event.fields["last_words"]
    name = str(event.fields["process"]).replace("-", " ")
    return f"the {name} {event.fields['status']}{f': {words}' if words else ''}"
