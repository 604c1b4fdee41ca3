"""A finished run as the checkers see it: read from its directory, never from a live process.

Rule 1: reading is tolerant of what a crash leaves (a torn last line, a missing artefact), never of what it
        means: what is missing is None and the checker that needs it says unknown.
Rule 2: events are in the order of time; events of the same instant stay in the order of arrival.
Rule 3: artefacts are read when they are asked for; they may be large.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import ValidationError

from testbed.errors import RecordError
from testbed.history import Event, Origin
from testbed.record.beats import BeatArray, read_beats
from testbed.record.oracle_log import read_logs
from testbed.record.run_dir import RunDir
from testbed.scenario.document import Scenario

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    U64Array = NDArray[np.uint64]
    U8Array = NDArray[np.uint8]

# A node is called by what it is in the run; in a leg the same one may be the other of the two.
NODES_AND_MORE: Final = ("source_node", "dest_node", "container")
NEVER_NS: Final = 2**63  # later than any event


@dataclass(frozen=True)
class RunRecord:
    """Everything that was recorded of one run."""

    run_dir: RunDir
    manifest: dict[str, Any]
    scenario: Scenario
    events: tuple[Event, ...] = field(repr=False)

    def all(self, name: str, origin: Origin | None = None) -> Iterator[Event]:
        """The events of this name, in order."""
        return (event for event in self.events if event.name == name and origin in (None, event.origin))

    def last(self, name: str, origin: Origin | None = None) -> Event | None:
        """The newest event of this name."""
        return max(self.all(name, origin), key=lambda event: event.at_ns, default=None)

    @property
    def sender_was_killed(self) -> bool:
        """Whether a fault killed the source's node in the last attempt: its counters died with it."""
        return self.node_was_killed("source")

    def node_was_killed(self, host: Origin) -> bool:
        """Whether a fault killed this host's node, or all of the host, in the last attempt and before its end."""
        ended = self.ended
        return any(
            event.fields["kind"] == "kill"
            and event.fields["host"] == host
            and event.fields["parameters"]["what"] in NODES_AND_MORE
            and event.at_ns >= self.attempt_begins_ns
            and (ended is None or event.at_ns < ended.at_ns)
            for event in self.all("fault_applied", "testbed")
        )

    @property
    def of_run(self) -> RunRecord:
        """The record of the whole run: this one, unless it is one leg's (leg_views.py)."""
        return self

    @property
    def networks(self) -> int:
        """How many the run made for its hosts: two are joined by something that ends TCP."""
        return sum(1 for _ in self.of_run.all("network_made", "testbed"))

    def was_in_force(self, kind: str) -> bool:
        """Whether a fault of this kind was, at any time in the last attempt; it may be from before the leg."""
        healed = {event.fields["fault"]: event.at_ns for event in self.of_run.all("fault_healed", "testbed")}
        ended_ns = self.ended.at_ns if self.ended is not None else NEVER_NS
        return any(
            event.fields["kind"] == kind
            and event.at_ns < ended_ns
            and healed.get(event.fields["fault"], NEVER_NS) >= self.attempt_begins_ns
            for event in self.of_run.all("fault_applied", "testbed")
        )

    @property
    def ended(self) -> Event | None:
        """The source's account of the migration, if it gave one."""
        return self.last("migration_ended", "source")

    @property
    def lost(self) -> Event | None:
        """That the guest died where it had been handed over to, if it did: its process there was the only one."""
        return self.last("guest_lost", "testbed")

    @property
    def attempt_begins_ns(self) -> int:
        """When the last attempt was asked for; 0 when none was."""
        requested = self.last("migration_requested", "testbed")
        return requested.at_ns if requested is not None else 0

    def arrived(self, name: str) -> list[Event]:
        """What the destination told of the last attempt's bytes, in order; each such event names its attempt."""
        asked = self.last("migration_requested", "testbed")
        if asked is None:
            return []
        attempt = f"{asked.fields['migration']}#{asked.fields['attempt']}@"
        return [event for event in self.all(name, "dest") if str(event.fields["attempt"]).startswith(attempt)]

    @property
    def rounds(self) -> list[Event]:
        """The rounds of the last attempt that ended, in order: an earlier attempt's pages are no part of it."""
        return [event for event in self.all("round_ended", "source") if event.at_ns >= self.attempt_begins_ns]

    @property
    def outcome(self) -> str:
        """What became of the migration: "failed" when nobody could say, "cancelled" when it was not begun."""
        if self.ended is not None:
            return "guest_lost" if self.lost is not None else str(self.ended.fields["outcome"])
        return "failed" if self.last("run_cut_short") is None else "cancelled"

    @property
    def outcome_reason(self) -> str:
        """Why, in one line; empty when all went well."""
        told = (self.ended, self.lost, self.last("run_broken"), self.last("run_cut_short"))
        reasons = [str(event.fields.get("reason") or "") for event in told if event is not None]
        if not reasons:
            return "the record ends without an outcome"
        return "; ".join(reason for reason in reasons if reason)

    @property
    def completed(self) -> bool:
        """Whether the guest was handed over."""
        return self.outcome == "completed"

    @property
    def verified(self) -> bool:
        """Whether the destination had the whole image: the guest was handed over, or that was rehearsed."""
        return self.outcome in ("completed", "rehearsal")

    @property
    def pages(self) -> int:
        """Of the guest."""
        return self.scenario.guest.memory // 4096

    @cached_property
    def beats(self) -> dict[str, BeatArray]:
        """The beats that each host's guest agent recorded, by host."""
        return self._read_beats()

    @cached_property
    def oracle(self) -> bytes:
        """What the guest logged outside its memory, whole records, in the order in which it wrote them."""
        return self._read_oracle()

    def _read_beats(self) -> dict[str, BeatArray]:
        return {host: read_beats(self.run_dir.artefact(f"{host}.beats")) for host in self.scenario.origins}

    def _read_oracle(self) -> bytes:
        return read_logs(self.run_dir.artefact(f"{host}.oracle") for host in self.scenario.origins)

    def artefact(self, name: str) -> Path:
        """Where the evidence of this name is."""
        return self.run_dir.artefact(name)

    def u64(self, name: str) -> U64Array | None:
        """An artefact of little-endian 64-bit words, or None."""
        path = self.artefact(name)
        return np.fromfile(path, dtype="<u8") if path.exists() else None

    def u8(self, name: str) -> U8Array | None:
        """An artefact of bytes, or None."""
        path = self.artefact(name)
        return np.fromfile(path, dtype=np.uint8) if path.exists() else None


def load(path: Path) -> RunRecord:
    """Reads a run directory. Raises RecordError when it is none or cannot be judged."""
    run_dir = RunDir(path.resolve())
    try:
        manifest = json.loads(run_dir.manifest.read_text(encoding="utf-8"))
        scenario = Scenario.model_validate(manifest["scenario"])
        lines = run_dir.events.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecordError(
            f"{path}: is no run directory ({error.filename} is missing); `ballast run` names its own"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise RecordError(f"{path}: the record is damaged: {str(error).splitlines()[0]}") from error
    events = [_event(line, number, len(lines), run_dir) for number, line in enumerate(lines, 1)]
    ordered = sorted((event for event in events if event is not None), key=lambda event: event.at_ns)
    return RunRecord(run_dir, manifest, scenario, tuple(ordered))


def _event(line: str, number: int, lines: int, run_dir: RunDir) -> Event | None:
    try:
        document = json.loads(line)
        return Event(document["at_ns"], document["origin"], document["name"], document["fields"])
    except (ValueError, KeyError, TypeError) as error:
        if number == lines:  # the testbed was killed while it wrote its last line
            return None
        raise RecordError(f"{run_dir.events}: line {number} is damaged: {error}") from error
