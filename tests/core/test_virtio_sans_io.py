"""The virtio package touches nothing but what it is given."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import virtio

ALLOWED = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "json",
    "numpy",
    "struct",
    "sys",
    "typing",
    "virtio",
}
MODULES = sorted(Path(virtio.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[path.stem for path in MODULES])
def test_a_module_imports_neither_io_nor_clock_nor_chance(path: Path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    assert {name.partition(".")[0] for name in imported} <= ALLOWED
