"""docs/safety.md shows the machines and the crash table that there are."""

import importlib.util
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "safety.md"


def generator():
    spec = importlib.util.spec_from_file_location("safety", PAGE.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_parts_are_up_to_date():
    text = PAGE.read_text(encoding="utf-8")
    assert generator().generated(text) == text, "run: python docs/safety.py"


def test_every_phase_is_drawn():
    safety, text = generator(), PAGE.read_text(encoding="utf-8")
    for phases in (safety.source_phases.SourcePhase, safety.dest_phases.DestPhase):
        assert not {phase.name for phase in phases if f"    {phase.name} --> " not in text}
