"""A synthetic run: a small pre-copy in numpy that leaves the directory which a real run would leave.

Rule 1: source and destination are real memory and hashes are computed from it: a checker that is fooled by
        the model would be fooled by the real thing.
Rule 2: a fault changes one mechanism where it would go wrong, never the evidence afterwards.
Rule 3: without a fault every checker says valid.

Public, for tests of checkers and of tools that read run directories.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np
import xxhash

from guest_agent.oracle import ORACLE_RECORD
from testbed.record import run_dir as run_dirs
from testbed.record.beats import BEAT
from testbed.units import PAGE_BYTES

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from testbed.history import Origin
    from testbed.record.run_dir import RunDir

Fault: TypeAlias = Literal[
    "page_wrongly_skipped",  # a page in use was taken for a hinted one
    "write_lost_after_harvest",  # the guest wrote once more after the last harvest
    "device_store_not_logged",  # the device wrote a used ring and did not log it
    "stale_zero_page",  # a zero record was not stored over older data
    "image_rolled_back",  # the whole guest, consistently, is an older one
    "owners_overlap",  # the source went on while the destination ran
    "wire_miscounted",  # the kernel's counter and the messages disagree
    "ledger_unbalanced",  # a hinted page is in no column
]

MS: Final = 1_000_000
BEAT_NS: Final = 2 * MS
MEMORY_BYTES: Final = 16 << 20  # the smallest guest that a scenario may have
PAGES: Final = MEMORY_BYTES // PAGE_BYTES
# The guest's pages: rings and tables, the store, memory that was freed and is not zero, the rest never touched.
RING_PFN: Final = 1
STORE: Final = slice(8, 1032)
FREED: Final = slice(1032, 3080)
STORE_ITEMS: Final = 1024
USED, FREE = 0, 1
NEVER_SENT, AS_DATA, AS_ZERO = 0, 1, 2
PAUSED_NS: Final = 1_000 * MS
RUNNING_NS: Final = 1_030 * MS


@dataclass
class _Guest:
    """Source memory, its frame table, and the versions that the store holds and has logged."""

    memory: NDArray[np.uint64]
    frames: NDArray[np.uint8]
    log: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def boot(cls, seed: int) -> _Guest:
        memory = np.zeros((PAGES, PAGE_BYTES // 8), dtype=np.uint64)
        noise = np.random.default_rng(seed)
        for used in (slice(0, 8), STORE, FREED):
            memory[used] = noise.integers(1, 2**63, memory[used].shape, dtype=np.uint64)
        memory[STORE, 0] = 0
        frames = np.full(PAGES, FREE, dtype=np.uint8)
        frames[:8], frames[STORE] = USED, USED
        guest = cls(memory, frames)
        guest.update(np.arange(STORE_ITEMS))
        return guest

    def update(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """One more version of each item, in memory and then in the log; returns the pages written."""
        self.memory[STORE.start + items, 0] += np.uint64(1)
        versions = self.memory[STORE.start + items, 0]
        self.log += list(zip(items.tolist(), versions.tolist(), strict=True))
        return STORE.start + items

    def problems(self) -> list[str]:
        """The self-check: memory against the last logged versions."""
        expected = dict(self.log)
        held = self.memory[STORE, 0].tolist()
        return [
            f"item {item} has version {held[item]}, expected {version}"
            for item, version in expected.items()
            if held[item] != version
        ]


class SyntheticRun:
    """Writes the record of one migration of a small guest, with at most one fault, below `root`."""

    def __init__(self, root: Path, *, fault: Fault | None = None, seed: int = 1) -> None:
        self.fault = fault
        self.run_dir: RunDir = run_dirs.create(root, "synthetic", seed)
        self._events: list[dict[str, Any]] = []
        self._rounds: list[dict[str, int]] = []
        self._guest = _Guest.boot(seed)
        self._dest = np.zeros_like(self._guest.memory)
        self._sent = np.zeros(PAGES, dtype=np.uint8)
        self._hinted = 0
        self._migrate()
        self._write(seed)

    def _migrate(self) -> None:
        guest = self._guest
        snapshot = guest.memory.copy()
        hinted = guest.frames == FREE
        if self.fault == "page_wrongly_skipped":
            hinted[STORE.start + 3] = True
        self._hinted = int(hinted.sum())
        self._round(np.ones(PAGES, dtype=bool), hinted)

        dirty = np.zeros(PAGES, dtype=bool)
        dirty[guest.update(np.arange(100, 200))] = True
        guest.memory[RING_PFN, 7] += np.uint64(1)
        dirty[RING_PFN] = self.fault != "device_store_not_logged"
        guest.memory[5] = 0
        dirty[5] = True
        self._round(dirty, np.zeros(PAGES, dtype=bool))
        if self.fault == "write_lost_after_harvest":
            guest.update(np.array([300]))
        if self.fault == "image_rolled_back":
            guest.memory[STORE] = snapshot[STORE]
            self._dest[STORE] = snapshot[STORE]

    def _round(self, candidates: NDArray[np.bool_], hinted: NDArray[np.bool_]) -> None:
        memory = self._guest.memory
        skipped = candidates & hinted
        to_send = candidates & ~hinted
        zero = to_send & ~memory.any(axis=1)
        data = to_send & ~zero
        self._dest[data] = memory[data]
        if self.fault != "stale_zero_page":
            self._dest[zero] = 0
        self._sent[data], self._sent[zero] = AS_DATA, AS_ZERO
        if self._rounds:
            self._rounds[-1]["dirtied_pages"] = int(candidates.sum())
        self._rounds.append({
            "round": len(self._rounds) + 1,
            "duration_ms": 10,
            "candidate_pages": int(candidates.sum()),
            "sent_pages": int(data.sum()),
            "zero_pages": int(zero.sum()),
            "skipped_pages": int(skipped.sum()),
            "dirtied_pages": 0,
            "payload_bytes": int(data.sum()) * PAGE_BYTES,
            "grpc_bytes": int(data.sum()) * (PAGE_BYTES + 8) + 200,
            "wire_bytes": int(data.sum()) * (PAGE_BYTES + 10) + 400,
        })  # fmt: skip

    def _write(self, seed: int) -> None:
        problems = self._guest.problems()
        self._event(600, "testbed", "guest_status", host="source", free_pages=3000, ballooned_pages=0)
        self._event(700, "testbed", "migration_requested", migration="synthetic", attempt=1)
        self._event(701, "source", "migration_started", tracker="uffd", tracker_reason="synthetic")
        for number, figures in enumerate(self._rounds):
            self._event(800 + 10 * number, "source", "round_ended", **figures)
        self._event(1030, "dest", "guest_running", at_ns=RUNNING_NS, guest_epoch=2)
        self._event(1040, "source", "migration_ended", **self._outcome())
        self._event(1500, "testbed", "cpu_used", source=0.1, dest=0.2, guest=0.3)
        items = len(dict(self._guest.log))
        self._event(1600, "testbed", "guest_checked", host="dest", ok=not problems, problems=problems[:100],
                    checked_items=items - len(problems), expected_items=items)  # fmt: skip
        self._event(1700, "testbed", "final_status", host="source", state="frozen", guest_epoch=1)
        self._event(1701, "testbed", "final_status", host="dest", state="paused", guest_epoch=2)
        self._write_beats()
        self._write_artefacts()
        scenario = {"name": "synthetic", "seed": seed, "guest": {"memory": MEMORY_BYTES}}
        run_dirs.write_json(self.run_dir.manifest, {"schema": 1, "run": "00000000", "scenario": scenario})
        lines = "".join(json.dumps(event) + "\n" for event in self._events)
        self.run_dir.events.write_text(lines, encoding="utf-8")

    def _outcome(self) -> dict[str, Any]:
        payload, grpc, wire = (
            sum(entry[name] for entry in self._rounds)
            for name in ("payload_bytes", "grpc_bytes", "wire_bytes")
        )
        rounds = [
            {
                "index": entry["round"],
                "hinted_pages": entry["skipped_pages"],
                "skipped_pages": entry["skipped_pages"],
                "late_pages": 0,
                "absent_pages": 0,
                "redirtied_pages": 0,
            }
            for entry in self._rounds
        ]
        if self.fault == "ledger_unbalanced":
            rounds[0]["hinted_pages"] += 1
        totals = {name: sum(entry[name] for entry in rounds) for name in rounds[0] if name != "index"}
        return {
            "outcome": "completed",
            "reason": "",
            "total_ms": 330.0,
            "setup_ms": 10.0,
            "downtime_ms": 30.0,
            "downtime_parts_ms": {"pause": 1.0},
            "hints": {**totals, "stale_pages": 0, "rejected_ranges": 0, "rounds": rounds},
            "bytes": {
                "payload": payload,
                "grpc": grpc,
                "wire_tx": wire * 2 if self.fault == "wire_miscounted" else wire,
                "wire_rx": 1000,
                "wire_source": "tcp_info",
                "messages": 2 * len(self._rounds),
                "tcp": {
                    "tx_bytes": wire * 2 if self.fault == "wire_miscounted" else wire,
                    "rx_bytes": 1000,
                    "retransmitted_bytes": 0,
                    "unheard": 0,
                },
            },
            "artefacts": ["source_hashes", "frames", "sent"],
            "engine": {},
        }

    def _write_beats(self) -> None:
        source_end = RUNNING_NS + 20 * MS if self.fault == "owners_overlap" else PAUSED_NS
        source = _beats(range(500 * MS, source_end, BEAT_NS), epoch=1, first=1)
        following = int(source["beat"][-1]) + 1
        if self.fault == "image_rolled_back":
            following -= 50
        dest = _beats(range(RUNNING_NS, RUNNING_NS + 500 * MS, BEAT_NS), epoch=2, first=following)
        source.tofile(self.run_dir.artefact("source.beats"))
        dest.tofile(self.run_dir.artefact("dest.beats"))

    def _write_artefacts(self) -> None:
        log = np.array([(1, 1, item, version) for item, version in self._guest.log], dtype=ORACLE_RECORD)
        log.tofile(self.run_dir.artefact("source.oracle"))
        page_hashes(self._guest.memory).tofile(self.run_dir.artefact("source_hashes"))
        page_hashes(self._dest).tofile(self.run_dir.artefact("dest_hashes"))
        self._guest.frames.tofile(self.run_dir.artefact("frames"))
        self._sent.tofile(self.run_dir.artefact("sent"))

    def _event(self, at_ms: int, origin: Origin, name: str, **fields: Any) -> None:
        self._events.append({"at_ns": at_ms * MS, "origin": origin, "name": name, "fields": fields})


def page_hashes(memory: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """xxh3_64 of every row."""
    return np.array([xxhash.xxh3_64_intdigest(page.tobytes()) for page in memory], dtype="<u8")


def _beats(at_ns: range, *, epoch: int, first: int) -> NDArray[np.void]:
    beats = np.empty(len(at_ns), dtype=BEAT)
    beats["at_ns"], beats["guest_epoch"] = np.array(at_ns), epoch
    beats["beat"] = np.arange(first, first + len(at_ns))
    return beats
