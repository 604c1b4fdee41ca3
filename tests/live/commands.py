"""`ballast` as a person types it: for tests of whole commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.live.runs import TINY


class Commands:
    """`ballast` as a person types it, in a directory of its own."""

    def __init__(self, place: Path):
        self.place = place
        self.scenario = place / "tiny.toml"
        self.scenario.write_text(TINY)

    def start(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "testbed", *words],
            cwd=self.place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip

    def run(self, *words, code=0):
        """Its output; what it complained of."""
        process = self.start(*words)
        out, err = process.communicate(timeout=120)
        told = [line for line in err.splitlines() if not line.startswith("{")]
        assert process.returncode == code, (words, out, told)
        return out, told

    def json(self, *words, code=0):
        return json.loads(self.run(*words, "--json", code=code)[0])

    def up(self, *options):
        return Path(self.json("up", str(self.scenario), *options)["session"])
