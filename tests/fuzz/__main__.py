"""`python -m tests.fuzz [TARGET …] --seconds N`: the coverage-guided fuzzer (atheris, dependency group `fuzz`).

Starts from tests/fuzz/corpus/TARGET. An input that breaks a target is left in the working directory as crash-…:
make it a file of the corpus, with the name of what it shows, and fix what it found. With `--grow` some of
the inputs that reach what the corpus does not are added to it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
INPUT_SECONDS_MAX = 5  # one input takes about a millisecond
GROWTH_MAX = 20  # inputs per run and target: the corpus stays small
MEMORY_MIB_MAX = 1024  # of the fuzzer; a target itself needs some MiB


def fuzz(target: str, arguments: list[str]) -> None:
    """Runs libFuzzer in this process, which ends with it."""
    import atheris  # noqa: PLC0415 - only where its wheel is

    with atheris.instrument_imports(include=["migration", "virtio"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415

    atheris.Setup([sys.argv[0], *arguments], TARGETS[target])
    atheris.Fuzz()


def run(target: str, arguments: list[str]) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.fuzz", "--inside", target, "--", *arguments]
    return subprocess.run(command, check=False).returncode


def grow(corpus: Path, found: Path) -> None:
    """Adds the newest of what reached something new: these reached farthest."""
    newest = sorted(found.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in newest[:GROWTH_MAX]:
        shutil.copyfile(path, corpus / path.name[:16])


def main() -> int:
    """Exit codes: 0 nothing was found, 1 something was, 3 atheris is not installed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=20, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="libFuzzer's; 0: another one every time")
    parser.add_argument("--grow", action="store_true", help="add to the corpus what reaches more")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.inside:
        fuzz(options.inside, [word for word in arguments + options.targets if word != "--"])
        return 0
    try:
        import atheris  # noqa: F401, PLC0415
    except ImportError:
        sys.stderr.write(
            "the fuzzer needs atheris: pip install --group fuzz (CPython 3.11 or newer on Linux)\n"
        )
        return 3
    from tests.fuzz.targets import INPUT_BYTES_MAX, TARGETS  # noqa: PLC0415

    worst = 0
    for target in options.targets or TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            limits = [
                f"-max_total_time={options.seconds}",
                f"-max_len={INPUT_BYTES_MAX[target]}",
                f"-timeout={INPUT_SECONDS_MAX}",
                f"-rss_limit_mb={MEMORY_MIB_MAX}",
                f"-seed={options.seed}",
                f"-artifact_prefix=crash-{target}-",
                "-print_final_stats=1",
                "-verbosity=0",
            ]
            print(f"fuzzing {target} for {options.seconds} s", flush=True)  # noqa: T201
            worst = max(worst, run(target, [*limits, scratch, str(CORPUS / target)]) != 0)
            if options.grow and not worst:
                grow(CORPUS / target, Path(scratch))
    return worst


if __name__ == "__main__":
    sys.exit(main())
