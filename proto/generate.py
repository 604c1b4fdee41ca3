"""Generates the typed gRPC stubs in migration/pb/ from the schemas beside this file.

    python proto/generate.py [OUTPUT_DIR]

The stubs are committed; tests/core/test_stubs.py regenerates them and compares.
"""

import os
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "proto" / "ballast" / "v1"
NAMES = ("migration.proto", "node.proto")


def generate(output: Path) -> None:
    """Writes the stubs below `output`, in the package migration.pb.

    The virtual path makes protoc see the schemas as migration/pb/*.proto, so that the generated modules
    import each other by the place where they live and not by the place of the schema.
    """
    # protoc finds its plug-ins on PATH; ours are beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-Imigration/pb={SCHEMAS}",
            f"-I{well_known}",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--mypy_out={output}",
            f"--mypy_grpc_out={output}",
            *(f"migration/pb/{name}" for name in NAMES),
        ]
    )
    if status != 0:
        sys.exit(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
