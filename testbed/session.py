"""One run's way: the guest boots, settles, migrates, runs on, is stopped and asked what it remembers.

Rule 1: every step is a fact in the history before the next one is taken.
Rule 2: whatever became of the migration, the guest is checked where it is, and the evidence is collected.
Rule 3: the first Ctrl-C cancels the migration and waits for its outcome; the second gives up waiting.
Rule 4: a silence has a deadline; a process that dies ends the wait that needed it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from testbed.errors import InterruptedRunError, RunBrokenError
from testbed.migration_keys import migrate_request
from testbed.oracle_log import RECORD_BYTES, last_versions, read_logs
from virtio.balloon import F_STATS_VQ, has

if TYPE_CHECKING:
    from collections.abc import Callable

    from migration.pb import node_pb2
    from testbed.history import Event, History
    from testbed.hosts.port import Host, Hosts
    from testbed.interrupt import Interrupt
    from testbed.run_dir import RunDir
    from testbed.scenario import Scenario

READY_S: Final = 60.0
READY_S_PER_GIB: Final = (
    60.0  # workloads fill memory at its first touch, well above 100 MB/s even when shared
)
OUTCOME_S: Final = 60.0  # beyond the migration's own timeout: hashing both RAMs, recording, answering
OUTCOME_S_PER_GIB: Final = 20.0
NO_TIMEOUT_S: Final = 3600.0
RUNNING_S: Final = 30.0
BALLOON_S: Final = 60.0
CHECK_S: Final = 300.0
ARTEFACT_S: Final = 120.0
LOOK_S: Final = 0.02


class Session:
    """Drives two started hosts through one scenario."""

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
        self._gib = scenario.guest.memory / 2**30

    def run(self) -> None:
        """The whole way. Raises RunBrokenError or InterruptedRunError where it cannot go on."""
        self.settle()
        ended = self._migrate()
        owner = self._owner_after(str(ended.fields["outcome"]))
        if owner is not None:
            self._check_where_it_is(owner)
        self._collect(ended)
        self._note_final_states()

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
        self._await_state(self._hosts.dest, "standby", RUNNING_S)

    def _inflate(self) -> None:
        pages = self._scenario.balloon.num_pages
        if not pages:
            return
        source = self._hosts.source.client
        source.set_balloon(pages)
        self._history.note("balloon_set", num_pages=pages)
        self._poll(lambda: source.guest_status().actual == pages, BALLOON_S, "the balloon to inflate")
        self._history.note("balloon_inflated", actual=pages)

    def _migrate(self) -> Event:
        self._note_guest(self._hosts.source, "guest_status")
        before = self._cpu_seconds()
        request = migrate_request(
            self._scenario.migration,
            migration=self._migration,
            attempt=1,
            dest_address=self._hosts.dest.migration_address,
            dest_server_name=self._hosts.dest.server_name,
            rehearsal=self._scenario.rehearses,
        )
        self._history.note("migration_requested", migration=self._migration, attempt=1)
        self._hosts.source.client.migrate(request)
        ended = self._await_outcome()
        after = self._cpu_seconds()
        self._history.note("cpu_used", **{part: after[part] - before[part] for part in before})
        return ended

    def _await_outcome(self) -> Event:
        limit_s = (self._scenario.migration.timeout / 1000 or NO_TIMEOUT_S) + self._grace_s
        try:
            return self._await(_outcome, limit_s, "the migration's outcome", needs=("source-node",))
        except InterruptedRunError:
            reason = "interrupted by the user"
        except RunBrokenError:
            if not self._hosts.source.node.alive:
                raise
            reason = f"no outcome within {limit_s:.0f} s"
        reply = self._hosts.source.client.cancel(reason)
        self._history.note("cancel_asked", reason=reason, effective=reply.effective, phase=reply.phase)
        return self._await(
            _outcome,
            self._grace_s,
            "the cancelled migration's outcome",
            needs=("source-node",),
            cancelled=True,
        )

    @property
    def _grace_s(self) -> float:
        return OUTCOME_S + OUTCOME_S_PER_GIB * self._gib

    def _owner_after(self, outcome: str) -> Host | None:
        if outcome == "guest_lost":
            return None
        if outcome != "completed":
            self._await_state(self._hosts.source, "running", RUNNING_S)
            return self._hosts.source
        self._await(
            lambda event: event.origin == "dest" and event.name == "guest_running",
            RUNNING_S,
            "the guest to run at the destination",
            needs=("dest-node", "dest-agent"),
            cancelled=True,
        )
        return self._hosts.dest

    def _check_where_it_is(self, owner: Host) -> None:
        self._interrupt.pause_unless_hurried(self._scenario.run.run_on / 1000)
        self._note_guest(owner, "guest_ran_on")
        owner.client.pause_guest()
        self._hosts.collect()
        logs = (self._run_dir.artefact(f"{origin}.oracle") for origin in ("source", "dest"))
        expected = last_versions(read_logs(logs))
        checked = owner.client.check_guest(expected, CHECK_S)
        self._history.note(
            "guest_checked",
            host=owner.origin,
            ok=checked.ok,
            problems=list(checked.problems),
            checked_items=checked.checked_items,
            expected_items=len(expected) // RECORD_BYTES,
        )

    def _collect(self, ended: Event) -> None:
        wanted = [(self._hosts.source, str(name)) for name in ended.fields.get("artefacts", ())]
        verified = ended.fields["outcome"] in ("completed", "rehearsal")
        if verified and self._scenario.migration.integrity == "full":
            wanted.append((self._hosts.dest, "dest_hashes"))
        for host, name in wanted:
            host.client.save_artefact(name, self._run_dir.artefact(name), ARTEFACT_S)

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
        """CPU time so far of both nodes, and of the guest's two agents together."""
        source, dest = self._hosts.source, self._hosts.dest
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
                return event.fields["process"] in needs
            return self._interrupt.hurried if cancelled else event.name == "interrupted"

        event = self._history.wait_for(stops, timeout_s)
        if event is None:
            raise RunBrokenError(f"waited {timeout_s:.0f} s in vain for {what}")
        if matches(event):
            return event
        if event.name == "process_ended":
            raise RunBrokenError(_obituary(event))
        raise InterruptedRunError(f"interrupted while waiting for {what}")


def _answers_stats(balloon: dict[str, Any]) -> bool:
    return bool(balloon.get("ready")) and has(int(balloon.get("features", 0)), F_STATS_VQ)


def _outcome(event: Event) -> bool:
    return event.origin == "source" and event.name == "migration_ended"


def _obituary(event: Event) -> str:
    words = event.fields["last_words"]
    name = str(event.fields["process"]).replace("-", " ")
    return f"the {name} {event.fields['status']}{f': {words}' if words else ''}"
