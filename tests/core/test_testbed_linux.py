"""Linux guests in scenarios: what goes together, what this machine must have, and the markers' judgement."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from linux_guest import probe
from testbed.checkers import marker
from testbed.checkers.verdict import Verdict
from testbed.errors import MachineCannotError, UsageError
from testbed.machine import capabilities
from testbed.scenario.file import parse

LINUX = """
expect = "rehearsal"
[guest]
memory = "128MiB"
kind = "linux"
[[guest.workload]]
name = "marker"
size = "4MiB"
[migration]
tracker = "hash"
"""


def linux(*overrides):
    return parse(LINUX, default_name="linux", overrides=overrides)


def test_hashes_and_hints_go_together_where_the_guest_stays():
    scenario = linux()
    assert scenario.rehearses
    assert scenario.migration.hints


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("expect=completed", "expect"),
        ("migration.tracker=uffd", "migration.tracker"),
        ("guest.workload.0.name=idle", "guest.workload.0.size"),
        ("balloon.sg=false", "balloon.sg"),
        ("balloon.hints=walk", "balloon.hints"),
        ("guest.memory=64MiB", "guest.memory"),
        ("guest.kind=ballast", "guest.workload.0.name"),
    ],
)
def test_what_a_linux_guest_cannot_be_is_said_with_its_path(override, path):
    with pytest.raises(UsageError) as caught:
        linux(override)
    assert any(problem.startswith(f"{path}:") for problem in caught.value.problems), caught.value.problems


def test_a_workload_of_the_other_kind_is_refused():
    with pytest.raises(UsageError, match="'kv' is a workload of the guest of kind 'ballast' alone"):
        parse(
            LINUX.replace(
                'name = "marker"\nsize = "4MiB"', 'name = "kv"\nrecords = 1\noperations_per_second = 1'
            ),
            default_name="linux",
        )


@pytest.mark.parametrize(
    "overrides", [("migration.rehearsal=true",), ("expect=rehearsal",)], ids=["unexpected", "unordered"]
)
def test_a_rehearsal_is_ordered_and_expected_together(overrides):
    with pytest.raises(UsageError, match="go together"):
        parse('[guest]\nmemory = "64MiB"', default_name="plain", overrides=overrides)


def test_a_machine_without_the_packages_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(probe, "programs", lambda: "apt-get install user-mode-linux busybox-static")
    monkeypatch.setattr(probe, "freezing", lambda: "no cgroup freezer")
    with pytest.raises(MachineCannotError) as caught:
        capabilities.require(linux())
    assert caught.value.exit_code == 3
    assert list(caught.value.problems) == [
        "apt-get install user-mode-linux busybox-static",
        "no cgroup freezer",
    ]


def test_the_kernels_tracking_is_not_needed_for_a_guest_that_stays(monkeypatch):
    monkeypatch.setattr(capabilities, "probe_tracker", lambda: "no userfaultfd")
    for name in ("programs", "namespace", "freezing"):
        monkeypatch.setattr(probe, name, lambda: "")
    leaves = parse('[guest]\nmemory = "64MiB"', default_name="leaves")
    assert leaves.migration.hints
    assert list(capabilities.lacks(linux())) == []
    (missing,) = capabilities.lacks(leaves)
    assert "no userfaultfd" in missing


# --- markers ---------------------------------------------------------------------------------------

BLOCK = marker.BLOCK_PAGES


def record(tmp_path, *, hints=True, verified=True, lost=0, living_sent=1, ended_sent=0, whole=True):
    """A living marker in block 0, an ended one in block 1."""
    document = [
        {"name": "living", "alive": True, "pfns": list(range(10)), "lost_pages": lost},
        {"name": "ended", "alive": False, "pfns": list(range(BLOCK, BLOCK + 10)), "lost_pages": 0},
    ]
    path = tmp_path / "markers.json"
    path.write_text(json.dumps(document))
    sent = np.ones(2 * BLOCK, np.uint8)
    sent[3], sent[BLOCK : BLOCK + 10] = living_sent, ended_sent
    frames = np.zeros(2 * BLOCK, np.uint8)
    frames[BLOCK:] = 1
    frames[BLOCK + 500] = whole
    arrays = {"sent": sent, "frames": frames}
    return SimpleNamespace(
        scenario=SimpleNamespace(
            guest=SimpleNamespace(workload=[SimpleNamespace(name="marker")] * 2),
            migration=SimpleNamespace(hints=hints),
        ),
        verified=verified,
        run_dir=SimpleNamespace(artefact=lambda _: path),
        u8=arrays.get,
    )


def test_markers_that_were_treated_as_whose_they_were_are_valid(tmp_path):
    finding = marker.check(record(tmp_path))
    assert finding.verdict is Verdict.VALID
    assert finding.figures == {"alive_pages": 10, "ended_pages": 10, "ended_skipped_pages": 10}


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        ({"living_sent": 0}, Verdict.INVALID),
        ({"lost": 1}, Verdict.INVALID),
        ({"ended_sent": 1}, Verdict.UNKNOWN),
        ({"whole": False}, Verdict.UNKNOWN),
        ({"ended_sent": 1, "hints": False}, Verdict.VALID),
        ({"lost": 1, "verified": False}, Verdict.VALID),
    ],
)
def test_what_speaks_against_a_run_with_markers(tmp_path, fault, verdict):
    assert marker.check(record(tmp_path, **fault)).verdict is verdict


def test_markers_without_evidence_prove_nothing(tmp_path):
    missing = record(tmp_path)
    (tmp_path / "markers.json").unlink()
    assert marker.check(missing).verdict is Verdict.UNKNOWN
