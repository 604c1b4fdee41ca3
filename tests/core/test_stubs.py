"""The committed stubs in migration/pb are what the schemas in proto/ generate today."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "migration" / "pb"


def test_regenerating_the_stubs_changes_nothing(tmp_path: Path) -> None:
    # protoc looks for its plug-in on the PATH; ours lies beside the interpreter, activated or not.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(
        [sys.executable, ROOT / "proto" / "generate.py", tmp_path], env=environment, check=True, timeout=60
    )
    generated = {path.name: path.read_bytes() for path in (tmp_path / "migration" / "pb").iterdir()}
    committed = {
        path.name: path.read_bytes()
        for path in STUBS.iterdir()
        if path.suffix in {".py", ".pyi"} and path.name != "__init__.py"
    }
    assert generated.keys() == committed.keys()
    different = [name for name, content in generated.items() if content != committed[name]]
    assert not different, f"run `make proto` and commit: {different} are not what proto/ generates"
