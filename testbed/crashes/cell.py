"""One crash cell: real processes are killed at a point of a real migration, started again, and judged.

Rule 1: the cell is a run like any other, with a record that `ballast check` judges again; its crash is in the
        history as a fault.
Rule 2: what must hold is asked of the whole chain: the outcome is the table's; never two owners and exactly one
        where a guest survived; no lost write; and the balloon, inflated and deflated by the back-end that the
        driver has found again, follows.
Rule 3: what was measured by a process that was killed is lost, and is no reason against a cell.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from testbed.checkers.verdict import Verdict
from testbed.crashes.link import link_of
from testbed.crashes.table import CANCELLED_AT, HEARD_AT, Cell
from testbed.errors import RunBrokenError, TestbedError
from testbed.run.runner import FinishedRun, conclude, record_run
from testbed.scenario.file import parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from testbed.crashes.link import Link
    from testbed.history import Event, Origin
    from testbed.host_handles import Host, HostProcess
    from testbed.interrupt import Interrupt
    from testbed.run.session import Session
    from testbed.scenario.document import Scenario

HOLD_MS: Final = 120_000  # a node waits so long for its crash; the strike comes within a second
WAIT_S: Final = 30.0  # for what follows within a second, on a loaded machine in some
NOTICED_S: Final = 30.0  # keepalive finds a link that died without a word within 10 s
BALLOON_PAGES: Final = 128
BALLOON_LOOK_S: Final = 0.02  # between two looks for a state
# What speaks about safety; the others measure, and what they measure may have died.
SAFETY: Final = ("owner", "oracle", "memory", "expectation")

# A second round is certain: a store is rewritten as it is sent. Small, so that a cell takes seconds.
SCENARIO: Final = """
[guest]
memory = "32MiB"
[[guest.workload]]
name = "freed"
fraction = 0.5
keep = 0.05
[[guest.workload]]
name = "writer"
rate = "2000pages/s"
working_set = "4MiB"
[[guest.workload]]
name = "kv"
records = 500
operations_per_second = 300
[migration]
skip = "both"
hint_wait = "2s"
downtime_limit = "1ms"
rounds_max = 3
bandwidth = "64MiB/s"
link_timeout = "0s"
[run]
settle = "20ms"
run_on = "50ms"
"""


@dataclass(frozen=True, slots=True)
class CellRun:
    """What came of a cell."""

    cell: Cell
    run: FinishedRun
    problems: Sequence[str]  # none: as the table says, and safe

    @property
    def line(self) -> str:
        """For a list."""
        told = "; ".join(self.problems) or "as it must be"
        return f"{self.cell.name}: {self.run.result.outcome} ({told})"


def scenario_of(cell: Cell, seed: int, overrides: Sequence[str] = ()) -> Scenario:
    """What runs while it happens."""
    chosen = parse(SCENARIO, default_name="crash", overrides=[*overrides, f"seed={seed}"])
    name = f"crash-{cell.name}".replace("/", "-").replace(" ", "-").replace("%", "")
    return chosen.model_copy(update={"name": name, "expect": cell.outcome})


def run_cell(
    cell: Cell,
    out: Path,
    interrupt: Interrupt,
    watch: Callable[[Event], None] = lambda _: None,
    *,
    seed: int = 1,
    overrides: Sequence[str] = (),
) -> CellRun:
    """Runs and judges it. Raises MachineCannotError, UsageError: nothing was started."""
    scenario = scenario_of(cell, seed, overrides)
    run_dir, broken = record_run(
        scenario, out, interrupt, watch, lambda session: _Cell(cell, session, scenario).drive()
    )
    return judged(cell, conclude(run_dir), broken)


def judged(cell: Cell, run: FinishedRun, broken: TestbedError | None) -> CellRun:
    """Everything that speaks against it."""
    problems = [] if broken is None else [str(broken)]
    findings = run.judgement.findings
    for name in SAFETY:
        finding = findings[name]
        # The frame table dies with the source's agent, what was read back with the destination's node.
        lost_with_its_holder = (
            name == "memory"
            and finding.verdict is Verdict.UNKNOWN
            and (cell.crash == "guest" or "dest" in cell.nodes_killed)
        )
        if finding.verdict is not Verdict.VALID and not lost_with_its_holder:
            problems += [f"{name}: {reason}" for reason in finding.reasons]
    for name, finding in findings.items():
        if name not in SAFETY and finding.verdict is Verdict.INVALID:
            problems += [f"{name}: {reason}" for reason in finding.reasons]
    return CellRun(cell, run, problems)


class _Cell:
    """Drives one session."""

    def __init__(self, cell: Cell, session: Session, scenario: Scenario) -> None:
        self._cell = cell
        self._session = session
        self._scenario = scenario
        self._hosts = session.hosts
        self._history = session.history
        self._failed = ""

    def drive(self) -> None:
        """Raises RunBrokenError."""
        session = self._session
        session.settle()
        session.expect_back(frozenset(process.name for process in self._victims))
        with link_of(self._hosts, "ballast_crash") as link:
            striking = threading.Thread(target=self._strike, args=(link,), name="crash", daemon=True)
            self._arm()
            striking.start()
            try:
                outcome = session.make_leg(1, self._scenario.legs[0], meanwhile=striking.join)
            finally:
                striking.join()  # ends: each of its waits has WAIT_S or NOTICED_S
            if self._failed:
                raise RunBrokenError(self._failed)
            if outcome != "guest_lost":
                session.go_on()
                self._try_balloon(self._hosts.hosts[session.here])

    @property
    def _victims(self) -> list[HostProcess]:
        hosts = self._hosts.hosts
        if self._cell.crash == "guest":
            return [hosts[self._cell.guest_host].agent]
        return [hosts[origin].node for origin in self._cell.nodes_killed]

    def _held(self) -> list[tuple[Origin, str]]:
        """Where which node is to stand, in the order in which they come there."""
        held: list[tuple[Origin, str]] = [(self._cell.side, self._cell.point)]
        if (heard := HEARD_AT.get(self._cell.point)) is not None:
            held.append(("dest", heard))
        return held

    def _arm(self) -> None:
        before = CANCELLED_AT.get(self._cell.point)
        if before is not None:
            self._hosts.source.client.arm_point(before, HOLD_MS)
        for origin, point in self._held():
            self._hosts.hosts[origin].client.arm_point(point, HOLD_MS)

    def _strike(self, link: Link) -> None:
        try:
            self._carry_out(link)
        except (TestbedError, OSError) as error:
            self._failed = f"crash {self._cell.name}: {' '.join(str(error).split())}"
            self._history.note("fault_failed", fault=0, reason=self._failed)

    def _carry_out(self, link: Link) -> None:
        cell, hosts = self._cell, self._hosts.hosts
        if (before := CANCELLED_AT.get(cell.point)) is not None:
            self._await_point("source", before)
            hosts["source"].client.cancel("cancelled where its guest stands still")
            hosts["source"].client.release_point(before)
        for origin, point in self._held():
            self._await_point(origin, point)
        for process in self._victims:
            process.kill()
        if cell.crash == "guest":
            self._await_death()
        if cell.crash == "link":
            link.cut()
        self._note("fault_applied", at=cell.point, parameters={"what": f"{cell.guest_host}_node"})
        for origin in cell.nodes_killed:
            hosts[origin].node.restart()
        for origin, point in self._held():
            if origin not in cell.nodes_killed:
                hosts[origin].client.release_point(point)
        if cell.crash == "link":
            self._await_notice()
            link.heal()
        self._note("fault_healed")

    def _note(self, name: str, **fields: Any) -> None:
        cell = self._cell
        kind = "cut" if cell.crash == "link" else "kill"
        if "parameters" in fields:
            whats = {
                "source": "source_node",
                "both": "source_node",
                "dest": "dest_node",
                "guest": "guest_agent",
            }
            fields["parameters"] = {"what": whats.get(cell.crash, "link")}
        host = "source" if cell.crash in ("source", "both") else "dest"
        self._history.note(name, fault=0, kind=kind, host=host, **fields)

    def _await_point(self, origin: Origin, point: str) -> None:
        def reached(event: Event) -> bool:
            ended = event.name == "migration_ended"
            return ended or (
                event.name == "point_reached" and event.origin == origin and event.fields["point"] == point
            )

        event = self._history.wait_for(reached, WAIT_S)
        if event is None or event.name == "migration_ended":
            raise RunBrokenError(f"the {origin} never came to {point}")

    def _await_death(self) -> None:
        """Before anybody goes on: the table is about hosts that know, not about how fast the news travels."""
        origin = self._cell.guest_host

        def heard(event: Event) -> bool:
            return event.name == "guest_link_lost" and event.origin == origin

        if self._history.wait_for(heard, WAIT_S) is None:
            raise RunBrokenError(f"the {origin} did not hear that its guest agent is gone")

    def _await_notice(self) -> None:
        noticed = ("migration_ended", "commit_unanswered", "forget_unheard")
        if self._history.wait_for(lambda event: event.name in noticed, NOTICED_S) is None:
            raise RunBrokenError(f"the source did not notice within {NOTICED_S:.0f} s that its link is cut")

    def _try_balloon(self, host: Host) -> None:
        """The driver answers the device of whatever process has its back-end now."""
        client = host.client
        before = client.guest_status().actual
        for pages in (before + BALLOON_PAGES, before):
            self._await_so(lambda: client.guest_status().balloon_ready, "the driver to find its back-end")
            client.set_balloon(pages)
            self._await_so(
                lambda pages=pages: client.guest_status().actual == pages,  # type: ignore[misc]
                f"the balloon to have {pages} pages",
            )
        self._history.note("balloon_tried", host=host.origin, pages=BALLOON_PAGES)

    def _await_so(self, is_so: Callable[[], bool], what: str) -> None:
        moment = threading.Event()
        for _ in range(round(WAIT_S / BALLOON_LOOK_S)):
            if is_so():
                return
            moment.wait(BALLOON_LOOK_S)
        raise RunBrokenError(f"waited {WAIT_S:.0f} s in vain for {what}")
