"""Writes the generated parts of docs/safety.md: the diagrams from the machines' transition tables, the crash table.

    python docs/safety.py

Parts stand between `<!-- generated: NAME -->` and `<!-- end -->`; tests/core/test_docs_safety.py compares.
"""

import re
import sys
from collections import defaultdict
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from migration import dest_phases, source_phases  # noqa: E402 - found beside this folder
from testbed.crashes.table import as_markdown  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
PART = re.compile(r"(<!-- generated: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Edges = dict[tuple[Enum, Enum], list[str]]


def edges_of(transitions: dict) -> Edges:
    """Every change of phase that the table allows, with the events that bring it about."""
    edges: Edges = defaultdict(list)
    for phase, events in transitions.items():
        for event, targets in events.items():
            for target in sorted(targets - {phase}, key=lambda one: one.value):
                edges[phase, target].append(event.__name__)
    return edges


def arrow(origin: str, target: str, events: list[str]) -> str:
    """One line of a diagram."""
    return f"    {origin} --> {target}: {', '.join(sorted(set(events)))}"


def source_diagram() -> list[str]:
    """Reversible phases in one box: what leads back to the source from any of them is drawn once."""
    box, back = source_phases.REVERSIBLE_PHASES, source_phases.SourcePhase.ABORTING
    edges = edges_of(source_phases.TRANSITIONS)
    shared = set.intersection(*(set(edges[phase, back]) for phase in box))
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> IDLE", "    state before_COMMITTING {"]
    inner = [pair for pair in edges if set(pair) <= box]
    lines += [f"    {arrow(one.name, other.name, edges[one, other])}" for one, other in inner]
    lines += ["    }", arrow("before_COMMITTING", back.name, list(shared))]
    for (one, other), events in edges.items():
        own = [event for event in events if not (other is back and event in shared)]
        if (one, other) not in inner and own:
            lines.append(arrow(one.name, other.name, own))
    return [*lines, *(f"    {phase.name} --> [*]" for phase in ordered(source_phases.FINAL_PHASES)), "```"]


def dest_diagram() -> list[str]:
    """The whole machine."""
    edges = edges_of(dest_phases.TRANSITIONS)
    drawn = [arrow(one.name, other.name, events) for (one, other), events in edges.items()]
    return ["```mermaid", "stateDiagram-v2", "    [*] --> IDLE", *drawn, "```"]


def ordered(phases: frozenset[source_phases.SourcePhase]) -> list[source_phases.SourcePhase]:
    """As they were declared."""
    return sorted(phases, key=lambda phase: phase.value)


PARTS = {"source machine": source_diagram, "destination machine": dest_diagram, "crash table": as_markdown}


def generated(page: str) -> str:
    """The page with its generated parts as they must be."""
    return PART.sub(lambda part: f"{part[1]}\n" + "\n".join(PARTS[part["name"]]()) + f"\n\n{part[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(generated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
