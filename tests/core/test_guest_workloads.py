"""The workloads: each works, moves to a copy of its RAM and passes; each check catches what it is for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from guest_agent.errors import RestoreError, WorkloadError
from guest_agent.frames import FrameKind
from guest_agent.oracle import ORACLE_RECORD, expectations
from guest_agent.testing import BareGuest
from guest_agent.workloads import WORKLOADS, Workload, build_workload, build_workloads
from guest_agent.workloads.base import Pacer
from guest_agent.workloads.content import PageContent, word_sums

MIB = 1 << 20
MS = 1_000_000

SPECS: dict[str, dict[str, Any]] = {
    "idle": {"name": "idle"},
    "freed": {"name": "freed", "fraction": 0.5, "keep": 0.1},
    "files": {"name": "files", "evict": 0.3, "bytes_max": "2MiB"},
    "writer": {"name": "writer", "rate": "20000pages/s", "working_set": "2MiB", "pattern": "random"},
    "writer_zipf": {"name": "writer", "rate": 5000, "working_set": "1MiB", "pattern": "zipf", "churn": 0.3},
    "writer_sequential": {"name": "writer", "rate": 9000, "working_set": MIB, "pattern": "sequential"},
    "kv": {"name": "kv", "records": 1003, "operations_per_second": 20_000},
    "build": {
        "name": "build", "jobs": 3, "arena": MIB // 4, "object": "64KiB", "objects": 5, "headers": "100KiB",
        "rate": "40000pages/s",
    },
}  # fmt: skip
WITH_PAGES = [name for name in SPECS if name != "idle"]
WITH_VERSIONS = [name for name in SPECS if name.startswith(("writer", "kv", "build"))]


class Bench:
    """One guest with workloads, its log, and time. Whatever a test opened is closed after it."""

    opened: ClassVar[list[BareGuest]] = []

    def __init__(
        self, tmp_path: Path, specs: list[dict[str, Any]], *, first: BareGuest | None = None
    ) -> None:
        self.log = tmp_path / "oracle"
        self.specs = specs
        self.bare = first or BareGuest.boot_new(32 * MIB, self.log)
        self.workloads = build_workloads(specs)
        self.now_ns = 5 * MS
        self.opened.append(self.bare)

    def boot(self) -> "Bench":
        for workload in self.workloads:
            workload.set_up(self.bare.guest)
        return self

    def run(self, steps: int = 30) -> "Bench":
        for _ in range(steps):
            for workload in self.workloads:
                assert workload.step(self.now_ns) >= 0
            self.now_ns += 2 * MS
        return self

    def migrate(self) -> "Bench":
        """A perfect migration; the clock of the other host is another one."""
        there = Bench(self.log.parent, self.specs, first=self.bare.clone(self.log))
        for here, restored in zip(self.workloads, there.workloads, strict=True):
            restored.restore(there.bare.guest, here.registers())
        there.now_ns = 0
        return there

    def problems(self, records: bytes | None = None) -> list[str]:
        expected = expectations(self.log.read_bytes() if records is None else records)
        assert self.bare.guest.buddy.check() == []
        return [line for workload in self.workloads for line in workload.check(expected)]


@pytest.fixture(autouse=True)
def close_everything() -> Iterator[None]:
    yield
    while Bench.opened:
        Bench.opened.pop().close()


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, [SPECS[request.param]]).boot()


def pages_of(bench: Bench) -> np.ndarray:
    return bench.bare.guest.frames.pfns_of(1).astype(np.int64)


@pytest.mark.parametrize("bench", SPECS, indirect=True)
def test_a_workload_runs_migrates_twice_and_passes_everywhere(bench: Bench) -> None:
    assert bench.run().problems() == []
    operations = bench.workloads[0].operations
    second = bench.migrate()
    assert second.problems() == []
    third = second.run().migrate().run()
    assert third.problems() == []
    assert third.workloads[0].operations >= operations


@pytest.mark.parametrize("bench", WITH_PAGES, indirect=True)
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_altered_bit_fails_the_check(bench: Bench, place: str) -> None:
    bench.run()
    pages = pages_of(bench)
    page, word = (pages[0], 0) if place == "first" else (pages[-1], 300)
    if bench.workloads[0].kind == "kv" and place == "last":
        word = 31  # of the last page's first record: its end is unused
    bench.bare.ram.words[page, word] ^= np.uint64(1 << 40)
    assert bench.problems()


@pytest.mark.parametrize("bench", WITH_PAGES, indirect=True)
def test_a_page_that_arrives_as_zeros_fails_the_check(bench: Bench) -> None:
    there = bench.run().migrate()
    there.bare.ram.words[pages_of(there)[-1]] = 0
    assert there.problems()


@pytest.mark.parametrize("bench", WITH_VERSIONS, indirect=True)
def test_a_consistent_rollback_of_one_page_fails_the_check(bench: Bench) -> None:
    """The older content is whole and right in itself: only the oracle knows better."""
    before = bench.bare.ram.words.copy()
    pfns = pages_of(bench)
    bench.run()
    changed = pfns[(bench.bare.ram.words[pfns] != before[pfns]).any(axis=1)]
    live = np.intersect1d(changed, pages_of(bench))
    bench.bare.ram.words[live[0]] = before[live[0]]
    assert bench.problems()


@pytest.mark.parametrize("bench", WITH_VERSIONS, indirect=True)
def test_a_rollback_of_the_whole_image_fails_even_after_it_ran_on(bench: Bench) -> None:
    """Everything in RAM agrees with itself; the log's versions repeat."""
    older = bench.migrate()  # the image as it was, with the registers of then
    bench.run(60)
    assert older.problems()
    older.run(120)
    assert any("do not rise by one" in line for line in older.problems())


@pytest.mark.parametrize("bench", WITH_VERSIONS, indirect=True)
def test_two_owners_at_once_show_in_the_log(bench: Bench) -> None:
    twin = bench.migrate()
    bench.run()
    twin.run()
    assert any("do not rise by one" in line for line in twin.problems())


@pytest.mark.parametrize("bench", WITH_PAGES, indirect=True)
def test_a_record_whose_write_is_missing_fails_the_check(bench: Bench) -> None:
    bench.run()
    records = np.frombuffer(bench.log.read_bytes(), dtype=ORACLE_RECORD)
    unwritten = records[-1:].copy()
    unwritten["version"] += np.uint64(1)
    assert bench.problems(records.tobytes()) == []
    assert bench.problems(records.tobytes() + unwritten.tobytes())


@pytest.mark.parametrize("bench", WITH_VERSIONS, indirect=True)
def test_a_write_that_was_never_recorded_fails_the_check(bench: Bench) -> None:
    bench.run()
    assert bench.problems(bench.log.read_bytes()[: -ORACLE_RECORD.itemsize])


@pytest.mark.parametrize("bench", WITH_PAGES, indirect=True)
def test_a_lost_log_fails_the_check(bench: Bench) -> None:
    assert bench.problems(b"")


@pytest.mark.parametrize("bench", WITH_PAGES, indirect=True)
def test_pages_lost_from_the_frame_table_fail_the_check(bench: Bench) -> None:
    pfn = int(pages_of(bench)[0])
    bench.bare.guest.buddy.free(pfn, 0)
    assert bench.problems()


@pytest.mark.parametrize("bench", ["freed", "writer", "kv"], indirect=True)
def test_an_image_without_the_workloads_pages_is_not_restored(bench: Bench) -> None:
    bench.bare.guest.buddy.free(int(pages_of(bench)[-1]), 0)
    copy = bench.bare.clone(bench.log)
    Bench.opened.append(copy)
    with pytest.raises(RestoreError, match="pages"):
        build_workload(bench.specs[0], 1).restore(copy.guest, bench.workloads[0].registers())


@pytest.mark.parametrize("bench", SPECS, indirect=True)
def test_registers_are_small_counters(bench: Bench) -> None:
    registers = bench.run().workloads[0].registers()
    assert all(type(value) is int for value in registers.values())
    assert len(str(registers)) < 200
    for key in registers if bench.workloads[0].kind != "idle" else ():
        for broken in ({k: v for k, v in registers.items() if k != key}, registers | {key: -1}):
            with pytest.raises(RestoreError, match=key):
                build_workload(bench.specs[0], 1).restore(bench.bare.guest, broken)


def test_all_kinds_together_share_one_guest(tmp_path: Path) -> None:
    bench = Bench(tmp_path, list(SPECS.values())).boot().run(50)
    assert bench.problems() == []
    there = bench.migrate().run(50)
    assert there.problems() == []


def test_the_same_seed_does_the_same(tmp_path: Path) -> None:
    logs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name, [SPECS["writer_zipf"], SPECS["kv"]]).boot().run()
        logs.append(bench.log.read_bytes())
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------- what each one is for


def test_freed_leaves_memory_that_is_free_and_not_zero(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [SPECS["freed"]]).boot()
    frames, ram = bench.bare.guest.frames, bench.bare.ram
    filled = ram.words.any(axis=1) & (frames.kind == FrameKind.FREE)
    assert np.count_nonzero(filled) == round(0.5 * ram.pages) - round(0.1 * ram.pages)
    kept = pages_of(bench)
    assert kept.size == round(0.1 * ram.pages)
    assert np.unique(ram.words[kept, 7]).size == kept.size


def test_page_content_is_unique_and_the_same_in_bulk_and_singly() -> None:
    content = PageContent(99)
    pages = content.pages(np.arange(2000, dtype=np.uint64))
    assert np.unique(pages[:, 0]).size == 2000
    assert np.unique(word_sums(pages)).size == 2000
    assert np.array_equal(content.pages(np.array([1999], dtype=np.uint64))[0], pages[1999])


def test_the_page_cache_gives_way_under_pressure_and_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [SPECS["files"]]).boot()
    buddy = bench.bare.guest.buddy
    cached = pages_of(bench).size
    buddy.alloc_bulk(buddy.free_pages + 10, kind=FrameKind.ANON, owner=9)
    assert cached - 512 <= pages_of(bench).size < cached
    assert bench.problems() == []


def test_the_restored_page_cache_still_gives_way(tmp_path: Path) -> None:
    there = Bench(tmp_path, [SPECS["files"]]).boot().migrate()
    buddy = there.bare.guest.buddy
    buddy.alloc_bulk(buddy.free_pages + 10, kind=FrameKind.ANON, owner=9)
    assert there.problems() == []


def test_files_are_the_real_ones(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a").write_bytes(b"x" * 5000)
    (data / "empty").write_bytes(b"")
    (data / "large").write_bytes(bytes(1 << 20))
    (data / "sub" / "b").write_bytes(b"y" * 10)
    (data / "link").symlink_to(data / "a")
    bench = Bench(tmp_path, [{"name": "files", "directory": str(data), "bytes_max": "64KiB"}]).boot()
    pages = pages_of(bench)
    content = bytes(bench.bare.ram.bytes[pages].reshape(-1))
    assert content == b"x" * 5000 + bytes(8192 - 5000) + b"y" * 10 + bytes(4086)
    assert bench.workloads[0].operations == 2


def test_churn_moves_pages_and_takes_freed_ones_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [SPECS["writer_zipf"]]).boot()
    before = pages_of(bench)
    bench.run()
    assert (pages_of(bench) != before).any()
    assert pages_of(bench).size == before.size


def test_kv_notices_a_broken_record_when_it_reads_it_and_remembers(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [{"name": "kv", "records": 16, "operations_per_second": 50_000}]).boot()
    page = pages_of(bench)[0]
    bench.bare.ram.words[page].reshape(16, 32)[:, 5] ^= np.uint64(1)
    bench.run()
    assert bench.workloads[0].registers()["read_errors"] > 0
    assert any("broken record" in line for line in bench.problems())


@pytest.mark.parametrize("rate", [0, 1, 100, 2000, 1_000_000])
def test_the_pacer_keeps_the_rate_and_never_bursts(rate: int) -> None:
    pacer, now_ns, done = Pacer(rate, batch_max=1024), 0, 0
    while now_ns < 2_000 * MS:
        done += pacer.take(now_ns)
        now_ns += max(pacer.wait_ns(), MS)
    assert done <= 2 * rate
    assert done >= min(2 * rate, 1000 * 1024) * 0.9 - 1
    now_ns += 3600 * 1000 * MS
    assert pacer.take(now_ns) <= min(1024, rate // 10 + 1)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, "none of build, files, freed, idle, kv, retake, writer"),
        ({"name": "nothing"}, "'nothing' is none of"),
        ({"name": "idle", "depth": 1, "breadth": 2}, "unknown options breadth, depth"),
        ({"name": "freed"}, "fraction: missing"),
        ({"name": "freed", "fraction": 1.5}, "no share"),
        ({"name": "freed", "fraction": -0.5}, "out of range"),
        ({"name": "freed", "fraction": True}, "no number"),
        ({"name": "freed", "fraction": 0.1, "keep": 0.2}, "more than fraction"),
        ({"name": "writer", "rate": 1}, "working_set: missing"),
        ({"name": "writer", "rate": "1 page", "working_set": "1MiB"}, "rate: '1 page'"),
        ({"name": "writer", "rate": float("nan"), "working_set": "1MiB"}, "out of range"),
        ({"name": "writer", "rate": 1, "working_set": "1MiB", "pattern": "wild"}, "'wild' is none of"),
        ({"name": "writer", "rate": 1, "working_set": 0}, "from 1 upwards"),
        ({"name": "kv", "records": 1.5, "operations_per_second": 1}, "1.5 is no whole number"),
        ({"name": "files", "directory": 5}, "no text"),
        ({"name": "build", "passes": 201}, "passes: 201 is more"),
    ],
)
def test_invalid_options_are_refused_by_name(spec: dict[str, Any], reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason):
        build_workload(spec, 1)


def test_units_and_plain_numbers_mean_the_same() -> None:
    plain = build_workload({"name": "writer", "rate": 2000, "working_set": 65_536}, 1)
    units = build_workload({"name": "writer", "rate": "2000pages/s", "working_set": "64 KiB"}, 1)
    assert (plain._rate, plain._pages) == (units._rate, units._pages) == (2000, 16)


def test_names_and_ids_follow_the_list() -> None:
    workloads: list[Workload] = build_workloads([{"name": "idle"}, {"name": "idle"}])
    assert [(workload.name, workload.id) for workload in workloads] == [("idle-1", 1), ("idle-2", 2)]
    assert set(WORKLOADS) == {"idle", "freed", "files", "writer", "kv", "build", "retake"}
    with pytest.raises(WorkloadError, match="ids are"):
        build_workload({"name": "idle"}, 0)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"name": "freed", "fraction": 1.0}, "pages wanted"),
        ({"name": "writer", "rate": 1, "working_set": "1GiB"}, "pages wanted"),
        ({"name": "files", "directory": "/nonexistent"}, "no files"),
    ],
)
def test_what_does_not_fit_is_refused_at_set_up(tmp_path: Path, spec: dict[str, Any], reason: str) -> None:
    bench = Bench(tmp_path, [spec])
    with pytest.raises(WorkloadError, match=reason):
        bench.boot()


@pytest.mark.parametrize("bench", ["build"], indirect=True)
def test_a_build_gives_its_memory_back_and_leaves_one_object_a_unit(bench: Bench) -> None:
    build = bench.workloads[0]
    held = pages_of(bench).size
    bench.run(400)
    assert build.operations > 3 * 64 * 3
    # Arenas come and go; objects are replaced: what it holds never grows beyond its options.
    assert pages_of(bench).size <= 3 * 64 + 5 * 16 + 25
    assert abs(pages_of(bench).size - held) <= 3 * 64
    versions = expectations(bench.log.read_bytes())[1, 0][1]
    assert versions.sum() > 5
    assert bench.problems() == []
