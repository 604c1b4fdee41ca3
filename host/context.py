"""What a host gives to its roles: its guest, its balloon device, its journal, its history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from host.hint_relay import HintRelay
from host.refusals import RefusedCalls
from host.tls import PLAIN, Trust

if TYPE_CHECKING:
    from pathlib import Path

    from host.balloon_server import BalloonServer
    from host.device_log import DeviceLog
    from host.event_log import EventLog
    from host.journal import Journal
    from host.local_guest import LocalGuest
    from host.points import Points
    from host.resources import ResourceMeter


@dataclass(frozen=True, slots=True)
class HostContext:
    """Shared by all roles of one node process; every part is thread-safe."""

    name: str
    run_dir: Path
    guest_memory_bytes_max: int  # what this host is willing to hold; 0: whatever the machine has
    events: EventLog
    journal: Journal
    guest: LocalGuest
    balloon: BalloonServer
    device_log: DeviceLog
    resources: ResourceMeter
    points: Points
    hints: HintRelay = field(default_factory=HintRelay)
    refused: RefusedCalls = field(default_factory=RefusedCalls)
    trust: Trust = PLAIN  # whom this host talks to over TCP, and how

    @property
    def artefacts_dir(self) -> Path:
        """Where roles keep what a judge will ask for."""
        return self.run_dir / "artefacts"
