"""Every input the fuzzer ever kept, through its target: what was found once stays found (tests/fuzz)."""

from pathlib import Path

import pytest

from tests.fuzz.targets import INPUT_BYTES_MAX, TARGETS

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"
INPUTS = sorted((path for path in CORPUS.rglob("*") if path.is_file()), key=str)
CORPUS_BYTES_MAX = 512 << 10


def test_every_target_has_inputs_and_the_corpus_is_small():
    assert {path.parent.name for path in INPUTS} == set(TARGETS) == set(INPUT_BYTES_MAX)
    assert sum(path.stat().st_size for path in INPUTS) <= CORPUS_BYTES_MAX


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input_of_the_corpus_ends_as_its_target_allows(path):
    data = path.read_bytes()
    assert len(data) <= INPUT_BYTES_MAX[path.parent.name]
    TARGETS[path.parent.name](data)
