"""The project's rooms: who may import whom, what the cores must not touch, how long things may be.

The rules are those of ARCHITECTURE.md; this file is where they are enforced.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Arrows point down only:  testbed -> {source_node, dest_node} -> host -> {migration, virtio}
#                          testbed -> linux_guest -> guest_agent -> virtio
MAY_IMPORT = {
    "virtio": set(),
    "migration": set(),
    "guest_agent": {"virtio"},
    "linux_guest": {"guest_agent", "virtio"},
    "host": {"migration", "virtio"},
    "source_node": {"host", "migration", "virtio"},
    "dest_node": {"host", "migration", "virtio"},
    "testbed": {"source_node", "dest_node", "guest_agent", "linux_guest", "host", "migration", "virtio"},
}
# Inside the testbed a package imports only what stands before it; what lies in testbed/ itself is everybody's.
TESTBED_FLOORS = (
    *("faults", "scenario", "record", "analysis", "checkers", "hosts", "machine", "report", "run"),
    *("crashes", "standing", "experiments", "sim", "cli"),
)
CORES = ("virtio", "migration")
GENERATED = ROOT / "migration" / "pb"

FOLDERS = {*MAY_IMPORT, "proto", "deploy", "tests", "benchmarks", "docs", "scenarios"}
LOCAL_FOLDERS = {"runs", "dist"}  # in .gitignore
TEST_FOLDERS = {"core", "fuzz", "sim", "live", "containers", "interop"}

# Time, randomness, identity, threads and every way to the outside are passed in (DESIGN 3.1).
FORBIDDEN_IN_CORES = {
    *("asyncio", "selectors", "select", "socket", "socketserver", "ssl", "http", "urllib"),
    *("grpc", "grpc_health", "grpc_reflection", "docker", "pyroute2", "psutil"),
    *("time", "datetime", "sched", "random", "secrets", "uuid"),
    *("logging", "structlog", "rich", "typer"),
    *("threading", "_thread", "queue", "multiprocessing", "concurrent", "subprocess", "signal"),
    *("os", "posix", "io", "pathlib", "shutil", "tempfile", "sqlite3", "mmap", "fcntl", "ctypes", "resource"),
}
CORE_LIBRARIES = {"numpy", "xxhash", "google", "lz4", "zstandard"}  # google: protobuf, without gRPC
FORBIDDEN_CALLS_IN_CORES = {"open", "print", "input", "exec", "eval", "__import__"}

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500


def modules_of(*folders: str) -> list[Path]:
    """Every hand-written Python file below the folders."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if GENERATED not in path.parents]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ALL_MODULES = modules_of(*MAY_IMPORT)
CORE_MODULES = modules_of(*CORES)
WRITTEN_MODULES = modules_of(*MAY_IMPORT, "proto", "tests", "benchmarks", "deploy", "docs")


def imports_of(tree: ast.AST) -> set[str]:
    """Full names of all imported modules, wherever in the file the import stands; relative ones as `.`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_import_finder_finds_hidden_imports() -> None:
    """Otherwise everything below would prove nothing."""
    source = """
import a.b as c
if TYPE_CHECKING:
    from d.e import f
def late():
    import g
    from . import h
    from ..i import j
"""
    assert imports_of(ast.parse(source)) == {"a.b", "d.e", "g", ".", "..i"}
    assert len(CORE_MODULES) > 10
    assert {path.parts[len(ROOT.parts)] for path in ALL_MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", ALL_MODULES, ids=named)
def test_arrows_point_down_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = top_level(imports_of(parsed(path)))
    assert "" not in names, "imports are absolute, so that this test reads them right"
    upwards = (names & set(MAY_IMPORT)) - MAY_IMPORT[package] - {package}
    assert not upwards, f"{package} must not import {sorted(upwards)}"


def test_the_arrows_have_no_circle() -> None:
    for package, below in MAY_IMPORT.items():
        assert package not in below
        for lower in below:
            assert MAY_IMPORT[lower] <= below, f"{package} -> {lower}: arrows are listed to the bottom"


def floor_of(parts: tuple[str, ...]) -> int:
    """Of a module of the testbed, by the names after `testbed`: 0 for what lies in testbed/ itself."""
    return 1 + TESTBED_FLOORS.index(parts[0]) if parts and parts[0] in TESTBED_FLOORS else 0


@pytest.mark.parametrize("path", modules_of("testbed"), ids=named)
def test_the_testbeds_packages_stand_on_each_other(path: Path) -> None:
    inside = path.relative_to(ROOT / "testbed").parts
    assert len(inside) == 1 or inside[0] in TESTBED_FLOORS, f"say in TESTBED_FLOORS where {inside[0]} stands"
    if path.name == "__main__.py":
        return  # it only calls the command
    names = imports_of(parsed(path))
    assert "testbed" not in names, "the package is named in the import, so that this test reads it right"
    above = {
        name
        for name in names
        if name.startswith("testbed.") and floor_of(tuple(name.split(".")[1:])) > floor_of(inside)
    }
    assert not above, f"{named(path)} must not import {sorted(above)}"


@pytest.mark.parametrize("path", CORE_MODULES, ids=named)
def test_cores_are_sans_io(path: Path) -> None:
    tree = parsed(path)
    names = top_level(imports_of(tree))
    assert not names & FORBIDDEN_IN_CORES
    foreign = names - set(sys.stdlib_module_names) - CORE_LIBRARIES - {path.relative_to(ROOT).parts[0]}
    assert not foreign, f"cores use {sorted(CORE_LIBRARIES)} and nothing else"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS_IN_CORES, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_random = node.value.id in {"np", "numpy"} and node.attr in {"random", "memmap", "fromfile"}
            assert not is_random, f"line {node.lineno}: np.{node.attr}"


def test_only_the_service_stubs_speak_grpc_and_no_core_imports_them() -> None:
    for path in CORE_MODULES:
        stubs = {name for name in imports_of(parsed(path)) if name.endswith("_pb2_grpc")}
        assert not stubs, f"{named(path)} imports {sorted(stubs)}, which import grpc"


def test_every_folder_is_one_of_the_rooms() -> None:
    folders = {
        path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))
    }
    strangers = {name for name in folders - FOLDERS - LOCAL_FOLDERS if not name.endswith(".egg-info")}
    assert not strangers
    assert set(MAY_IMPORT) <= folders
    tests = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert tests <= TEST_FOLDERS


def test_every_package_is_shipped_and_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(MAY_IMPORT)
    assert set(project["tool"]["mypy"]["packages"]) == set(MAY_IMPORT)
    assert not [package for package in MAY_IMPORT if not (ROOT / package / "py.typed").is_file()]


@pytest.mark.parametrize("path", WRITTEN_MODULES, ids=named)
def test_functions_and_files_are_short_enough_to_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES_MAX, f"{text.count(chr(10))} lines: this file wants to be two"
    long = {
        function.name: length
        for function in functions_of(ast.parse(text))
        if (length := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    }
    assert not long, f"functions of more than {FUNCTION_LINES_MAX} lines: {long}"


@pytest.mark.parametrize("path", ALL_MODULES, ids=named)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parsed(path))


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios").glob("*.toml")), ids=named)
def test_every_scenario_file_loads(path: Path) -> None:
    from testbed.scenario.file import load  # noqa: PLC0415 - only this test needs the testbed

    scenario = load(path)
    assert scenario.name == path.stem
