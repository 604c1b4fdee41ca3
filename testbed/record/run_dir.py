"""A run is a directory: runs/SCENARIO/UTC-SEED/ with everything that is needed to judge it again.

Rule 1: the directory is made exclusively; two runs never share one and none is ever overwritten.
Rule 2: every document is written once and appears whole (written beside, then renamed).
Rule 3: `latest` beside the runs of a scenario points at the newest one; it is a convenience, not evidence.

    manifest.json   what was asked for, by which versions, on which machine
    events.jsonl    the history, one event per line, in the order in which it arrived
    rounds.jsonl    the rounds of the migration
    result.json     the result document          verdict.json    what each checker said, and why
    logs/           output of every process      nodes/          the nodes' own files (journal, node.json)
    artefacts/      page hashes, frame kinds, beats, oracle logs: the evidence
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.clock import utc_stamp
from testbed.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SAME_SECOND_MAX = 1000  # runs of one scenario and seed that may start within one second


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths inside one run directory."""

    path: Path

    @property
    def manifest(self) -> Path:
        """What was asked for."""
        return self.path / "manifest.json"

    @property
    def events(self) -> Path:
        """The history."""
        return self.path / "events.jsonl"

    @property
    def rounds(self) -> Path:
        """One line per round of the migration."""
        return self.path / "rounds.jsonl"

    @property
    def result(self) -> Path:
        """The result document."""
        return self.path / "result.json"

    @property
    def verdict(self) -> Path:
        """What the checkers said."""
        return self.path / "verdict.json"

    @property
    def logs(self) -> Path:
        """Output of the processes."""
        return self.path / "logs"

    def artefact(self, name: str) -> Path:
        """A piece of evidence."""
        return self.path / "artefacts" / name

    def node(self, name: str) -> Path:
        """A node's own directory."""
        return self.path / "nodes" / name


def create(root: Path, scenario: str, seed: int) -> RunDir:
    """Makes the directory of a new run below `root`. Raises UsageError when that is not possible."""
    parent = root / scenario
    stamp = f"{utc_stamp()}-{seed}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = _make_exclusively(parent, stamp)
        for name in ("logs", "artefacts", "nodes"):
            (path / name).mkdir()
    except OSError as error:
        raise UsageError(f"{parent}: cannot make a run directory: {error.strerror}; choose --out") from error
    _point_latest(parent, path.name)
    return RunDir(path.resolve())


def write_json(path: Path, document: object) -> None:
    """Writes a JSON document that appears whole."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """Writes JSON lines that appear whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _make_exclusively(parent: Path, stamp: str) -> Path:
    for number in range(1, SAME_SECOND_MAX):
        path = parent / (stamp if number == 1 else f"{stamp}.{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise UsageError(f"{parent}: too many runs of {stamp}")


def _point_latest(parent: Path, name: str) -> None:
    beside = parent / f".latest.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(name)
    beside.replace(parent / "latest")
