"""What a migration cost: instants in, the fields of the event migration_ended out.

Rule 1: total and downtime are what the guest's user would have had: the time that `integrity = "full"` takes
        to hash the destination's RAM while the guest stands still is told apart, as verify_ms.
Rule 2: downtime is pause ordered -> the destination's COMMITTED answered, on the source's clock alone. Of a
        rehearsal it is pause ordered -> the guest runs on, without the time in which either host hashed its RAM.
Rule 3: the parts tile the downtime: each begins where the last one ended, so that their sum, without verify, is
        the downtime and nothing is left over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from migration.handover import OWN_PARTS, PEER_PARTS

PARTS = ("pause", "harvest", "send", "save", "prepare", "verify", "commit", "resume")


@dataclass(slots=True)
class Stopwatch:
    """Instants of one attempt, all from one monotonic clock, in ns; 0 means not reached."""

    requested_ns: int = 0
    first_round_ns: int = 0
    pause_ordered_ns: int = 0
    decided_ns: int = 0  # the guest is the destination's
    rehearsed_ns: int = 0  # the guest runs on here
    ended_ns: int = 0
    parts_ns: dict[str, int] = field(default_factory=dict)
    _seen_ns: int = 0  # until here the downtime is accounted for

    def pause_ordered(self, instant_ns: int) -> None:
        """The downtime begins."""
        self.pause_ordered_ns = self._seen_ns = instant_ns

    def passed(self, part: str, instant_ns: int) -> None:
        """What passed since the last part ended was this part (once more, if the guest is waited for again)."""
        if self.pause_ordered_ns:  # an attempt taken up after a restart was paused by a process that is gone
            self.parts_ns[part] = self.parts_ns.get(part, 0) + instant_ns - self._seen_ns
            self._seen_ns = instant_ns

    def decided(self, instant_ns: int, *, verify_ns: int, resume_ns: int) -> None:
        """COMMITTED was answered; what the destination measured itself is taken out of the calls' times."""
        self.decided_ns = instant_ns
        self.passed("commit", instant_ns)
        self._move("prepare", "verify", verify_ns)
        self._move("commit", "resume", resume_ns)

    def rehearsed(self, instant_ns: int, *, verify_ns: int) -> None:
        """The guest runs on here; the destination hashed its RAM for `verify_ns`, this host for what was told."""
        self.rehearsed_ns = instant_ns
        self.passed("resume", instant_ns)
        self._move("prepare", "verify", verify_ns)

    def _move(self, part: str, inner: str, inner_ns: int) -> None:
        """`inner` was inside `part` on another host's clock, which cannot have taken longer than the call."""
        inner_ns = min(inner_ns, self.parts_ns.get(part, 0))
        self.parts_ns[part] = self.parts_ns.get(part, 0) - inner_ns
        self.parts_ns[inner] = self.parts_ns.get(inner, 0) + inner_ns

    def measured_ms(self) -> dict[str, float]:
        """The parts that say what another stop will take: of a whole one all, else those of this host alone."""
        whole = OWN_PARTS + PEER_PARTS if self.decided_ns else OWN_PARTS
        return {name: self.parts_ns[name] / 1e6 for name in whole if name in self.parts_ns}

    def times(self) -> dict[str, object]:
        """total_ms, setup_ms, downtime_ms, verify_ms and the parts of the downtime."""
        verify_ns = self.parts_ns.get("verify", 0)
        switched_ns = self.decided_ns or self.rehearsed_ns
        end_ns = switched_ns or self.ended_ns
        # Of an attempt taken up after a restart the downtime is not known here.
        measured = switched_ns and self.pause_ordered_ns
        downtime_ns = switched_ns - self.pause_ordered_ns - verify_ns if measured else 0
        return {
            "total_ms": _ms(end_ns - self.requested_ns - verify_ns),
            "setup_ms": _ms(self.first_round_ns - self.requested_ns) if self.first_round_ns else 0.0,
            "downtime_ms": _ms(downtime_ns),
            "verify_ms": _ms(verify_ns),
            "downtime_parts_ms": {name: _ms(self.parts_ns.get(name, 0)) for name in PARTS},
        }


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
