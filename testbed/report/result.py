"""The result document: one JSON object per run, stable, because other tools read it.

Rule 1: it is a pure function of the record and the judgement; nothing is measured here.
Rule 2: every number has its unit in its name; what was not measured is 0, or null where 0 would mislead.
Rule 3: of a run with legs the figures are those of the last leg; `legs` has them for every leg.
Rule 4: fields may be added, none may change its meaning: that needs a new `schema`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ConfigDict, Field

from testbed.analysis.account import Account, account_of, dest_bytes_of_rounds
from testbed.analysis.decided import (
    AttemptPart,
    DecisionPart,
    RecoveriesPart,
    ThrottlePart,
    decisions_of,
    earlier_attempts_of,
    known,
)
from testbed.analysis.predicted import predicted_of
from testbed.documents import Part
from testbed.record.beats import blackout_ns
from testbed.record.leg_views import leg_path, legs_of
from virtio.balloon import (
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_HINT_WAIT_ON_ACK,
    F_MUST_TELL_HOST,
    F_PAGE_POISON,
    F_REPORTING,
    F_SG,
    F_STATS_VQ,
    has,
)

if TYPE_CHECKING:
    from testbed.checkers import Judgement
    from testbed.record.run_record import RunRecord


FEATURE_NAMES: Final = {
    "must_tell_host": F_MUST_TELL_HOST,
    "stats_vq": F_STATS_VQ,
    "deflate_on_oom": F_DEFLATE_ON_OOM,
    "free_page_hint": F_FREE_PAGE_HINT,
    "page_poison": F_PAGE_POISON,
    "reporting": F_REPORTING,
    "hint_wait_on_ack": F_HINT_WAIT_ON_ACK,
    "sg": F_SG,
}


class GuestPart(Part):
    """The guest as it was before the migration."""

    memory_bytes: int
    pages: int
    free_pages_at_start: int
    ballooned_pages_at_start: int


class RoundPart(Part):
    """One round of the migration."""

    index: int
    duration_ms: float
    candidate_pages: int
    sent_pages: int
    zero_pages: int
    skipped_pages: int
    ballooned_pages: int = 0  # left out: in the balloon when the round began
    dirtied_pages: int
    payload_bytes: int
    wire_bytes: int
    wire_rx_bytes: int = 0
    retransmitted_bytes: int = 0
    dest_wire_bytes: int | None = None  # of this round at the destination's interfaces, where it has its own


class HintsPart(Part):
    """The hint ledger."""

    hinted_pages: int = 0
    skipped_pages: int = 0
    late_pages: int = 0
    absent_pages: int = 0
    redirtied_pages: int = 0
    stale_pages: int = 0
    rejected_ranges: int = 0
    rounds: list[dict[str, Any]] = Field(default_factory=list)


class BalloonPart(Part):
    """The balloon: the device's account where the guest was last, and what its driver tells.

    Counts of pages are of that host alone: a node counts from its start.
    """

    features: list[str] = Field(default_factory=list)
    hints_driver: Literal["hold", "walk", "off"] | None = None
    num_pages: int = 0
    actual: int = 0
    poison_value: int = 0
    inflated_pages: int = 0
    deflated_pages: int = 0
    reported_pages: int = 0
    released_pages: int = 0
    hint_blocks_skipped: int = 0
    stats: dict[str, int] = Field(default_factory=dict)
    guest_errors: dict[str, int] = Field(default_factory=dict)


class BytesPart(Part):
    """Bytes, counted in three places."""

    payload: int = 0
    grpc: int = 0
    wire_tx: int = 0
    wire_rx: int = 0
    wire_source: Literal["interface", "tcp_info"] = "tcp_info"


class CompressionPart(Part):
    """What compression saved, and what it and deltas cost both hosts in CPU time."""

    kind: Literal["none", "lz4", "zstd"] = "none"
    chunks: int = 0
    given_up_chunks: int = 0  # of them: went as they were
    bytes_in: int = 0
    bytes_out: int = 0
    cpu_seconds_source: float = 0.0
    cpu_seconds_dest: float = 0.0


class DeltaPart(Part):
    """What deltas saved, before compression."""

    pages: int = 0
    bytes_saved: int = 0
    cache_hits: int = 0
    misses: int = 0
    evicted: int = 0


class IntegrityPart(Part):
    """The comparison of both hosts' memory."""

    compared_pages: int = 0
    skipped_pages_proved_free: int = 0  # of them ...
    skipped_pages_proved_ballooned: int = 0
    mismatches: int = 0


class FaultPart(Part):
    """A fault that was applied, since the request to migrate; healed_at_ms is null when it never was."""

    kind: str
    host: str = ""
    at: str = ""
    leg: int | None = None  # in which it came, of a run with legs
    packets: int | None = None  # that it harmed, where they were counted
    applied_at_ms: float
    healed_at_ms: float | None


class PredictedPart(Part):
    """What the model said at the end of round 1 (analysis/predicted.py); measured is what the result says."""

    outcome: Literal["completed", "cancelled"]
    converges: bool
    rounds: int
    payload_bytes: int
    total_ms: float
    downtime_ms: float
    reason: str
    basis: str


class CpuPart(Part):
    """CPU time from the request to migrate until the outcome."""

    source: float = 0.0
    dest: float = 0.0
    guest: float = 0.0


class MemoryPart(Part):
    """Each node's own memory at its peak, beyond guest RAM."""

    source_own_peak_bytes: int = 0
    dest_own_peak_bytes: int = 0


class Result(Part):
    """The result document of one run."""

    schema_: Literal[1] = 1
    scenario: str
    seed: int
    outcome: Literal["completed", "rehearsal", "cancelled", "failed", "guest_lost"]
    outcome_reason: str
    verdict: Literal["valid", "invalid", "unknown"]
    reasons: list[str]
    engine: dict[str, Any]
    total_ms: float
    setup_ms: float
    downtime_ms: float
    downtime_parts_ms: dict[str, float]
    verify_ms: float
    guest_blackout_ms: float | None
    guest: GuestPart
    rounds: list[RoundPart]
    hints: HintsPart
    balloon: BalloonPart
    bytes: BytesPart
    integrity: IntegrityPart
    faults: list[FaultPart]
    cpu_seconds: CpuPart
    own_memory: MemoryPart
    # The parts of downtime_parts_ms as they were expected when the guest was paused; verify is none of them.
    downtime_parts_ms_estimated: dict[str, float] = Field(default_factory=dict)
    downtime_ms_estimated: float | None = None  # when the guest was paused for good; compare with downtime_ms
    attempts: int = 1
    # The other figures are the last attempt's, the blackout is of all.
    earlier_attempts: list[AttemptPart] = Field(default_factory=list)
    decisions: list[DecisionPart] = Field(default_factory=list)
    recoveries: RecoveriesPart = RecoveriesPart()
    throttle: ThrottlePart = ThrottlePart()
    streams: int = 0  # of pages; 0 when none was opened
    compression: CompressionPart = CompressionPart()
    delta: DeltaPart = DeltaPart()
    predicted: PredictedPart | None = None
    account: Account | None = None  # of the bytes, layer by layer; null when nothing was counted
    # Of a run with [[leg]]: what stands here of one migration, for each of them.
    legs: list[dict[str, Any]] = Field(default_factory=list)
    run_dir: str

    model_config = ConfigDict(populate_by_name=True)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, in the order of the fields."""
        document = self.model_dump(mode="json")
        return {"schema": document.pop("schema_"), **document}


# What belongs to the run and not to one of its migrations.
RUN_FIELDS: Final = frozenset({"schema_", "scenario", "seed", "engine", "legs", "run_dir"})


def build(record: RunRecord, judgement: Judgement) -> Result:
    """The result document of a recorded and judged run.

    Of a run with legs the figures are those of the last leg that was begun, verdict and reasons those of the whole
    run, and `legs` has the figures of each: a sum of downtimes would be nobody's downtime.
    """
    if not judgement.legs:
        return _build_one(record, judgement)
    views = legs_of(record)
    results = [_build_one(view, one) for view, one in zip(views, judgement.legs, strict=True)]
    path = list(leg_path(record.scenario.leg))
    legs = [
        {
            "leg": number,
            "from": path[number - 1][0],
            "to": path[number - 1][1],
            **{key: value for key, value in one.model_dump(mode="json").items() if key not in RUN_FIELDS},
        }
        for number, one in enumerate(results, start=1)
    ]
    whole: dict[str, object] = {
        "verdict": judgement.verdict.value,
        "reasons": judgement.reasons,
        "engine": engine_facts(record),
        "legs": legs,
    }
    if results[-1].outcome == "completed" and len(results) < len(path):
        whole["outcome"] = "failed" if record.last("run_cut_short") is None else "cancelled"
        whole["outcome_reason"] = record.outcome_reason
    return results[-1].model_copy(update=whole)


def _build_one(record: RunRecord, judgement: Judgement) -> Result:
    ended = record.ended.fields if record.ended is not None else {}
    status = record.last("guest_status", "testbed")
    status_fields = status.fields if status is not None else {}
    integrity = judgement.findings["memory"].figures
    return Result(
        scenario=record.scenario.name,
        seed=record.scenario.seed,
        outcome=record.outcome,  # type: ignore[arg-type]  # pydantic checks that it is one of them
        outcome_reason=record.outcome_reason,
        verdict=judgement.verdict.value,
        reasons=judgement.reasons,
        engine=engine_facts(record),
        total_ms=ended.get("total_ms", 0.0),
        setup_ms=ended.get("setup_ms", 0.0),
        downtime_ms=ended.get("downtime_ms", 0.0),
        verify_ms=ended.get("verify_ms", 0.0),
        downtime_parts_ms=ended.get("downtime_parts_ms", {}),
        guest_blackout_ms=_blackout_ms(record),
        guest=GuestPart(
            memory_bytes=record.scenario.guest.memory,
            pages=record.pages,
            free_pages_at_start=status_fields.get("free_pages", 0),
            ballooned_pages_at_start=status_fields.get("ballooned_pages", 0),
        ),
        rounds=rounds_of(record),
        hints=HintsPart.model_validate(_known(HintsPart, ended.get("hints") or {})),
        balloon=balloon_of(record),
        bytes=BytesPart.model_validate(_known(BytesPart, ended.get("bytes") or {})),
        integrity=IntegrityPart.model_validate(_known(IntegrityPart, integrity)),
        faults=faults_of(record),
        cpu_seconds=CpuPart.model_validate(_known(CpuPart, _fields(record, "cpu_used"))),
        own_memory=_own_memory(record),
        streams=ended.get("streams", 0),
        compression=_compression(record),
        delta=DeltaPart.model_validate(_known(DeltaPart, ended.get("delta") or {})),
        predicted=_predicted(record),
        downtime_ms_estimated=ended.get("downtime_ms_estimated"),
        downtime_parts_ms_estimated=ended.get("downtime_parts_ms_estimated", {}),
        attempts=sum(1 for _ in record.all("migration_requested", "testbed")),
        recoveries=RecoveriesPart.model_validate(known(RecoveriesPart, ended.get("recoveries"))),
        throttle=ThrottlePart.model_validate(known(ThrottlePart, ended.get("throttle"))),
        earlier_attempts=earlier_attempts_of(record),
        decisions=decisions_of(record),
        account=account_of(record),
        run_dir=str(record.run_dir.path),
    )


def _compression(record: RunRecord) -> CompressionPart:
    """The source's account, and of the destination what it took to unpack."""
    told = dict(record.ended.fields.get("compression") or {}) if record.ended is not None else {}
    received = record.last("pages_received", "dest")
    told["cpu_seconds_dest"] = received.fields.get("unpack_cpu_seconds", 0.0) if received is not None else 0.0
    return CompressionPart.model_validate(_known(CompressionPart, told))


def rounds_of(record: RunRecord) -> list[RoundPart]:
    """The finished rounds, in order."""
    arrived = dest_bytes_of_rounds(record)
    return [
        RoundPart.model_validate(
            {
                **_known(RoundPart, event.fields),
                "index": event.fields["round"],
                "dest_wire_bytes": arrived.get(event.fields["round"]),
            }
        )
        for event in record.rounds
    ]


def balloon_of(record: RunRecord) -> BalloonPart:
    """As the last status of the guest says; before a migration ended, that of the source."""
    status = record.last("guest_ran_on", "testbed") or record.last("guest_status", "testbed")
    told = dict(status.fields.get("balloon") or {}) if status is not None else {}
    driver = told.get("driver") or {}
    names = [name for name, bit in FEATURE_NAMES.items() if has(int(told.get("features", 0)), bit)]
    return BalloonPart.model_validate(
        {
            **_known(BalloonPart, told),
            "features": names,
            "hints_driver": (driver.get("options") or {}).get("hints"),
            "hint_blocks_skipped": driver.get("hint_blocks_skipped", 0),
        }
    )


def faults_of(record: RunRecord) -> list[FaultPart]:
    """The faults that came, in the order in which they did."""
    requested = next(iter(record.all("migration_requested", "testbed")), None)
    since_ns = requested.at_ns if requested is not None else 0
    healed = {event.fields["fault"]: event for event in record.all("fault_healed", "testbed")}
    return [
        FaultPart(
            kind=event.fields["kind"],
            host=event.fields["host"],
            at=event.fields["at"],
            leg=event.fields.get("leg"),
            applied_at_ms=(event.at_ns - since_ns) / 1e6,
            healed_at_ms=(end.at_ns - since_ns) / 1e6 if end is not None else None,
            packets=end.fields.get("packets") if end is not None else None,
        )
        for event in record.all("fault_applied", "testbed")
        for end in (healed.get(event.fields["fault"]),)
    ]


def engine_facts(record: RunRecord) -> dict[str, Any]:
    """What ran, on what: versions, machine, and what the source chose."""
    ended = record.ended.fields if record.ended is not None else {}
    started = record.last("migration_started", "source")
    chosen = started.fields if started is not None else {}
    return {
        "name": record.scenario.engine,
        **record.manifest.get("machine", {}),
        "hosts": record.scenario.hosts.kind,
        "skip": record.scenario.migration.skip,
        "integrity": record.scenario.migration.integrity,
        **({"link": record.scenario.link.facts()} if record.scenario.link.shaped else {}),
        **{key: chosen[key] for key in ("tracker", "tracker_reason", "hint_rule") if key in chosen},
        **ended.get("engine", {}),
    }


def _blackout_ms(record: RunRecord) -> float | None:
    requested, ended = record.last("migration_requested", "testbed"), record.ended
    if requested is None or ended is None:
        return None
    first_ns = next(record.all("migration_requested", "testbed")).at_ns
    earlier = (first_ns, requested.at_ns) if first_ns < requested.at_ns else None
    window = (requested.at_ns, ended.at_ns)
    gap_ns = blackout_ns(record.beats["source"], record.beats["dest"], window, earlier)
    return None if gap_ns is None else gap_ns / 1e6


def _predicted(record: RunRecord) -> PredictedPart | None:
    foreseen = predicted_of(record)
    return None if foreseen is None else PredictedPart.model_validate(foreseen)


def _own_memory(record: RunRecord) -> MemoryPart:
    peaks = {"source": 0, "dest": 0}
    for event in record.all("node_resources"):
        peak = int(event.fields.get("own_memory_peak_bytes", 0))
        peaks[event.origin] = max(peaks.get(event.origin, 0), peak)
    return MemoryPart(source_own_peak_bytes=peaks["source"], dest_own_peak_bytes=peaks["dest"])


def _fields(record: RunRecord, name: str) -> dict[str, Any]:
    event = record.last(name, "testbed")
    return dict(event.fields) if event is not None else {}


def _known(part: type[Part], fields: Any) -> dict[str, Any]:
    """Only what the document declares: nodes may tell more than it promises."""
    return {key: fields[key] for key in part.model_fields if key in fields}
