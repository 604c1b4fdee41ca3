"""`python docs/limits.py` writes docs/limits.md: every limit, queue and wait of the packages, from their source.

Rule 1: a limit is a constant of a module whose name ends in one of SUFFIXES. Its reason is the comment on it, or
        the one directly above. Without a reason it is not documented, and a test fails.
Rule 2: a queue is a deque without maxlen, or one of the queue module's. Its comment begins with "bounded:".
Rule 3: a wait without a deadline says what ends it, in a comment that begins with "ends:".
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "virtio",
    "migration",
    "guest_agent",
    "linux_guest",
    "host",
    "source_node",
    "dest_node",
    "testbed",
)
# Generated code, and a world that is imagined: its figures limit nothing.
LEFT_OUT = ("migration/pb/", "testbed/sim/")
TESTING = "testing"  # public, for tests: its queues and waits are the tests'
SUFFIXES = re.compile(r"^_?[A-Z][A-Z0-9_]*_(MAX|LIMIT|S|MS|THREADS|CHUNKS)$")
RANGES = re.compile(r"^(U\d+_MAX|INDEX_MAX|NS_PER_S)$")  # what a type can hold, or a unit: no limits
QUEUES = frozenset({"deque", "Queue", "SimpleQueue", "LifoQueue", "PriorityQueue"})
WAITS = frozenset({"wait", "join", "result", "acquire", "get", "wait_for"})
BOUNDED, ENDS = "bounded:", "ends:"

INTRODUCTION = """\
# Limits

Made from the source by `python docs/limits.py`; a test compares. Every constant that limits something, with its
reason; every queue that has no size of its own, with what bounds it; every wait without a deadline, with what ends
it.

## What has no limit, and why

- **After COMMITTING a source asks until it is answered** (every `COMMIT_RETRY_MS`, each call with
  `COMMIT_TIMEOUT_S`): only the destination knows who owns the guest, and giving up would be guessing. An operator
  ends it.
- **A guest that is paused by a person stays paused**, and a session that stands (`ballast up`) stands until
  `ballast down`.
- **A source that keeps sending good chunks is a slow source**, however slow: the migration's own `timeout` ends it,
  at its source. A source that is silent is given up (`SILENCE_S`, `STREAM_SILENCE_S_MAX`).
- **Log files** grow by a line per event. Calls that are refused write fewer and fewer lines (`host/refusals.py`).
"""


@dataclass(frozen=True, slots=True)
class Found:
    """One row: what it is, its value, where it stands, and the words beside it ("" when there are none)."""

    what: str
    value: str
    where: str
    line: int
    words: str


@dataclass(slots=True)
class Collected:
    """Of all packages."""

    limits: list[Found] = field(default_factory=list)
    queues: list[Found] = field(default_factory=list)
    waits: list[Found] = field(default_factory=list)

    @property
    def unexplained(self) -> list[str]:
        """Where words are missing."""
        rows = self.limits + self.queues + self.waits
        return [f"{row.where}:{row.line}: {row.what}" for row in rows if not row.words]


class Source:
    """One module, with its comments."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.tree = ast.parse(text)
        self._code: set[int] = set()
        self._comments: dict[int, str] = {}
        layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self._comments[token.start[0]] = token.string.removeprefix("#").strip()
            elif token.type not in layout:
                self._code.update(range(token.start[0], token.end[0] + 1))

    def words(self, first: int, last: int) -> str:
        """The comments of these lines, else those directly above; checkers' directives are none."""
        here = [self._comments[line] for line in range(first, last + 1) if line in self._comments]
        if not (beside := " ".join(_said(words) for words in here).strip()):
            above: list[str] = []
            line = first - 1
            while line in self._comments and line not in self._code:
                above.insert(0, self._comments[line])
                line -= 1
            beside = " ".join(_said(words) for words in above).strip()
        return beside

    def limits(self) -> Iterator[Found]:
        """Constants of the module."""
        for node in self.tree.body:
            for name, value in _assigned(node):
                if SUFFIXES.match(name) and not RANGES.match(name):
                    words = self.words(node.lineno, node.end_lineno or node.lineno)
                    yield Found(name, ast.unparse(value), self.name, node.lineno, words)

    def calls(self) -> Iterator[tuple[Found, bool]]:
        """Queues without a size (True) and waits without a deadline (False), whatever their words."""
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Call):
                continue
            name = _called(node)
            if name in QUEUES and not _sized(node):
                yield self._found(node, BOUNDED), True
            elif name in WAITS and isinstance(node.func, ast.Attribute) and not _timed(name, node):
                yield self._found(node, ENDS), False

    def _found(self, node: ast.Call, marker: str) -> Found:
        words = self.words(node.lineno, node.end_lineno or node.lineno)
        _, found, why = words.partition(marker)
        what = ast.unparse(node)
        shown = what if len(what) < 60 else f"{what[:57]}..."
        return Found(shown, "", self.name, node.lineno, found and why.strip())


def _said(comment: str) -> str:
    return re.split(r"\bnoqa\b|\btype: ignore\b", comment)[0].rstrip(" -#")


def _assigned(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
        yield node.target.id, node.value
    elif isinstance(node, ast.Assign):
        target = node.targets[0]
        if isinstance(target, ast.Name):
            yield target.id, node.value
        elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for name, value in zip(target.elts, node.value.elts, strict=False):
                if isinstance(name, ast.Name):
                    yield name.id, value


def _called(node: ast.Call) -> str:
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _sized(node: ast.Call) -> bool:
    return any(word.arg in {"maxlen", "maxsize"} for word in node.keywords) or len(node.args) > 1


def _timed(name: str, node: ast.Call) -> bool:
    # `wait_for` has its condition first; what has any argument else is a wait with a deadline, or no wait at all.
    needed = 2 if name == "wait_for" else 1
    return len(node.args) + len(node.keywords) >= needed


@cache
def collect() -> Collected:
    """Everything, in the order of the packages."""
    collected = Collected()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(LEFT_OUT):
                continue
            source = Source(name, path.read_text())
            collected.limits += source.limits()
            if path.name.startswith(TESTING):
                continue
            for found, is_queue in source.calls():
                (collected.queues if is_queue else collected.waits).append(found)
    return collected


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def page() -> str:
    """The text of docs/limits.md."""
    found = collect()
    lines = [INTRODUCTION]
    for package in PACKAGES:
        rows = [
            (f"`{row.what}`", f"`{row.value}`", row.words, row.where)
            for row in found.limits
            if row.where.startswith(f"{package}/")
        ]
        lines += ["", f"## {package}", "", *_table(("limit", "value", "why", "where"), rows)]
    for title, verb, calls in (
        ("Queues without a size of their own", "bounded", found.queues),
        ("Waits without a deadline", "ends", found.waits),
    ):
        rows = [(row.where, f"`{row.what}`", row.words) for row in calls]
        lines += ["", f"## {title}", "", *_table(("where", "what", verb), rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for place in collect().unexplained:
        sys.stderr.write(f"{place}: no reason beside it\n")
    (ROOT / "docs" / "limits.md").write_text(page())
