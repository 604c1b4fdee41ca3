"""What a stop takes beside its pages, estimated part by part before it happens.

Rule 1: the parts have the names of the account of the downtime that was (source_node/accounting.py), so that
        both stand beside each other. Hashing for integrity "full" is no downtime, and no part.
Rule 2: what was measured counts before what is assumed: this migration's last harvest, what the last stop on this
        host took, the round trip on this very connection.
Rule 3: the guest's state crosses at the rate of its pages: on a slow link it is not nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# Assumed where nothing was measured, in ms: medians of benchmarks/downtime.py on two cores, without the round trips
# (0.1 ms on that loopback). They err on the side of too long: a machine that others use as well needs more.
PAUSE_MS_ASSUMED = 2.0
HARVEST_MS_ASSUMED = 1.0
SAVE_MS_ASSUMED = 2.0
PREPARE_MS_ASSUMED = 8.0
COMMIT_MS_ASSUMED = 5.0
RESUME_MS_ASSUMED = 3.0
STATE_BYTES_ASSUMED = 2048  # Prepare of a guest with two workloads; the bound of the vCPU state is 16 KiB

OWN_PARTS = ("pause", "harvest", "save")  # of this host alone, whatever the destination
PEER_PARTS = ("prepare", "commit", "resume")


@dataclass(frozen=True, slots=True)
class Handover:
    """Milliseconds per part, and bytes of state; the default is a hand-over that takes no time."""

    pause: float = 0.0
    harvest: float = 0.0
    save: float = 0.0
    prepare: float = 0.0
    commit: float = 0.0
    resume: float = 0.0
    round_trip: float = 0.0  # until the last pages are acknowledged; in prepare and commit it is contained
    state_bytes: int = 0

    def parts(self, send_ms: float, rate_bytes_per_s: float) -> dict[str, float]:
        """The whole downtime in ms, by part, when sending what is left takes `send_ms` at this rate."""
        return {
            "pause": self.pause,
            "harvest": self.harvest,
            "send": send_ms + self.round_trip,
            "save": self.save,
            "prepare": self.prepare + self.state_bytes * 1e3 / rate_bytes_per_s,
            "commit": self.commit,
            "resume": self.resume,
        }

    def harvested(self, harvest_ms: float) -> Handover:
        """The same, with what a harvest of this guest took just now."""
        return replace(self, harvest=harvest_ms)


NO_TIME = Handover()


@dataclass(frozen=True, slots=True)
class LastStop:
    """What the last stop on this host took, in ms per part; parts of a destination only where it is the same."""

    peer: str = ""
    parts_ms: Mapping[str, float] | None = None

    def towards(self, peer: str) -> dict[str, float]:
        """What of it holds for a stop towards `peer`."""
        holds = OWN_PARTS + (PEER_PARTS if peer == self.peer else ())
        return {name: ms for name, ms in (self.parts_ms or {}).items() if name in holds}


NO_STOP = LastStop()


def expected(measured: Mapping[str, float], round_trip_ms: float) -> Handover:
    """The hand-over to expect; `measured` has the parts that the last stop is known to have taken."""
    assumed = {
        "pause": PAUSE_MS_ASSUMED,
        "harvest": HARVEST_MS_ASSUMED,
        "save": SAVE_MS_ASSUMED,
        "prepare": PREPARE_MS_ASSUMED + round_trip_ms,
        "commit": COMMIT_MS_ASSUMED + round_trip_ms,
        "resume": RESUME_MS_ASSUMED,
    }
    state_bytes = 0 if "prepare" in measured else STATE_BYTES_ASSUMED
    return Handover(**{**assumed, **measured}, round_trip=round_trip_ms, state_bytes=state_bytes)
