"""How the tests are run, side by side, and what a run of them says at its end.

Rule 1: of the tests of one file one follows the other; files run side by side (`make test JOBS=2`). Those that look
        at everything of this user on the machine, or at an engine, are as one file.
Rule 2: what was skipped is told by its reasons: what this machine would have to have.
"""

import gc
from collections import Counter

import pytest

# `ballast clean` removes whatever is dead, and the newest session is meant where none is named.
LOOKS_AT_THE_MACHINE = (
    "tests/containers/",
    "tests/interop/",
    "tests/live/test_resolve.py",
    "tests/live/test_session_by_hand.py",
    "tests/live/test_testbed_run.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Rule 1."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - not there where nothing runs side by side

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "the machine" if file.startswith(LOOKS_AT_THE_MACHINE) else file

    return Files(config, log)


def pytest_collection_finish():
    """What was imported stays: tests that look for what is left behind need not walk through it each time.

    What a test makes is younger, and is collected and found as ever.
    """
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Rule 2: one line for each reason, not one for each test."""
    skipped = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.section("not shown to work here")
    for reason, tests in skipped.most_common():
        terminalreporter.write_line(f"{tests:4} skipped: {reason.removeprefix('Skipped: ')}")
