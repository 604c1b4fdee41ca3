"""The table of docs/balloon.md names real tests, and every error it names can be counted."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "balloon.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
CODE = "\n".join(
    path.read_text(encoding="utf-8") for folder in ("virtio", "host") for path in (ROOT / folder).glob("*.py")
)


def test_every_test_that_the_table_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert not {name for name in named if f"def {name}(" not in TESTS}


def test_every_row_of_the_standard_names_a_test_or_says_why_not():
    rows = [line for line in PAGE[PAGE.index("sentence by sentence") :].splitlines() if line.startswith("|")][
        2:
    ]
    assert len(rows) > 40
    for row in rows:
        assert "`test_" in row or "| \u2013 (" in row, row


def test_every_kind_of_misbehaviour_has_its_name_in_the_code():
    table = PAGE[PAGE.index("| misbehaviour") : PAGE.index("Passes are bounded")]
    kinds = {kind for row in table.split("\n|") for kind in re.findall(r"`(\w+)`", row.rsplit("|", 2)[-2])}
    assert len(kinds) > 20
    assert not {kind for kind in kinds - {"VhostUserError"} if f'"{kind}"' not in CODE}
