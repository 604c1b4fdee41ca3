"""The legs of a recorded run, each seen as a run of its own: giver "source", taker "dest".

Rule 1: a leg is what happened from its `leg_started` until the next one; the first begins with the run. A run
        without legs is one leg, and its record is the view.
Rule 2: a view is a record like any other: every checker and the result are made for it without knowing of legs.
Rule 3: the guest's logs are joined in the order in which it lived: leg by leg, the giver's part before the taker's.
        Where a leg's part of a log ends was noted when nobody wrote it any more.
Rule 4: a leg must complete before the next one; only the last one that was begun may end as the scenario expects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from testbed.record.oracle_log import read_log
from testbed.record.run_record import NEVER_NS, RunRecord
from testbed.scenario.leg_keys import FIRST_HOST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from testbed.history import Event, Origin
    from testbed.record.beats import BeatArray
    from testbed.scenario.leg_keys import Leg

HOST_FIELD: Final = "host"
HOSTS_FIELD: Final = "hosts"  # figures by host
BYSTANDER: Final = "third"


def artefact_name(name: str, leg: int) -> str:
    """As a leg's artefact is called in the run directory; leg 0 is the only one of a run without legs."""
    return f"leg{leg}.{name}" if leg else name


class OracleChain:
    """The guest's oracle log over all hosts, in the order in which it was written (Rule 3)."""

    def __init__(self, origins: Sequence[Origin], path_of: Callable[[str], Path]) -> None:
        self._path_of = path_of
        self._taken: dict[str, int] = dict.fromkeys(origins, 0)
        self._parts: list[bytes] = []

    def logged(self, giver: str, taker: str, until: Mapping[str, int] | None = None) -> bytes:
        """Everything so far, when the present leg is between these hosts; `until`: where its parts end."""
        return b"".join((*self._parts, *self._fresh(giver, taker, until)))

    def leg_ended(self, giver: str, taker: str, until: Mapping[str, int] | None = None) -> dict[str, int]:
        """The leg's part is complete; how much of each log belongs to the legs so far, in bytes."""
        for host, part in zip((giver, taker), self._fresh(giver, taker, until), strict=True):
            self._parts.append(part)
            self._taken[host] += len(part)
        return dict(self._taken)

    def _fresh(self, giver: str, taker: str, until: Mapping[str, int] | None) -> tuple[bytes, bytes]:
        ends = until or {}
        giving, taking = (
            read_log(self._path_of(f"{host}.oracle"))[self._taken[host] : ends.get(host)]
            for host in (giver, taker)
        )
        return giving, taking


@dataclass(frozen=True)
class LegRecord(RunRecord):
    """One leg of a run as a record."""

    number: int
    run: RunRecord  # of which it is a part
    leg_beats: Mapping[str, BeatArray]  # of its two hosts, within the leg
    leg_oracle: bytes  # of all legs up to this one

    @property
    def of_run(self) -> RunRecord:
        """With what began before the leg and went on in it."""
        return self.run

    def _read_beats(self) -> dict[str, BeatArray]:
        return dict(self.leg_beats)

    def _read_oracle(self) -> bytes:
        return self.leg_oracle

    def artefact(self, name: str) -> Path:
        """This leg's."""
        return self.run_dir.artefact(artefact_name(name, self.number))


def legs_of(record: RunRecord) -> list[RunRecord]:
    """The legs that were begun, in order; of a run without legs the record itself."""
    starts = list(record.all("leg_started", "testbed"))
    if not record.scenario.leg or not starts:
        return [record]
    chain = OracleChain(record.scenario.origins, record.run_dir.artefact)
    views: list[RunRecord] = []
    for index, start in enumerate(starts):
        after = starts[index + 1] if index + 1 < len(starts) else None
        views.append(_view(record, chain, start, begins_ns=start.at_ns if index else 0, after=after))
    return views


def _view(
    record: RunRecord, chain: OracleChain, start: Event, *, begins_ns: int, after: Event | None
) -> LegRecord:
    number, giver, taker = (start.fields[name] for name in ("leg", "giver", "taker"))
    roles: dict[str, Origin] = {giver: "source", taker: "dest"}
    ends_ns = after.at_ns if after is not None else NEVER_NS
    events = tuple(_renamed(event, roles) for event in record.events if begins_ns <= event.at_ns < ends_ns)
    ended = next((event for event in events if event.name == "leg_ended"), None)
    until = ended.fields["oracle_bytes"] if ended is not None else None
    oracle = chain.logged(giver, taker, until)
    chain.leg_ended(giver, taker, until)
    leg = record.scenario.leg[number - 1]
    # A leg that was made by hand says itself what was expected of it.
    expect = start.fields.get("expect") or (record.scenario.expect if after is None else "completed")
    scenario = record.scenario.model_copy(update={"migration": leg, "leg": (), "fault": (), "expect": expect})
    beats = {str(role): _within(record.beats[host], begins_ns, ends_ns) for host, role in roles.items()}
    return LegRecord(
        run_dir=record.run_dir,
        manifest=record.manifest,
        scenario=scenario,
        events=events,
        number=number,
        run=record,
        leg_beats=beats,
        leg_oracle=oracle,
    )


def _within(beats: BeatArray, begins_ns: int, ends_ns: int) -> BeatArray:
    return beats[(beats["at_ns"] >= begins_ns) & (beats["at_ns"] < ends_ns)]


def _renamed(event: Event, roles: Mapping[str, Origin]) -> Event:
    """The event with the hosts called by what they are in this leg; others keep their names, as bystanders."""
    fields: Mapping[str, Any] = event.fields
    if event.origin == "testbed":
        named: dict[str, Any] = {}
        if HOST_FIELD in fields:
            named[HOST_FIELD] = _called(str(fields[HOST_FIELD]), roles)
        if isinstance(by_host := fields.get(HOSTS_FIELD), dict):
            named[HOSTS_FIELD] = {_called(host, roles): figures for host, figures in by_host.items()}
        return replace(event, fields={**fields, **named})
    return replace(event, origin=_called(event.origin, roles))


def _called(host: str, roles: Mapping[str, Origin]) -> Any:
    return roles.get(host, BYSTANDER)


def leg_path(legs: Sequence[Leg]) -> Iterator[tuple[str, str]]:
    """(from, to) of every leg, by the hosts' short names."""
    here = FIRST_HOST
    for leg in legs:
        yield here, leg.to
        here = leg.to
