"""What can go wrong in the testbed, sorted by who has to act.

Rule 1: every error carries the exit code of the command line, so that nothing has to guess it later.
Rule 2: a message is one line that names what is wrong and what to do; `problems` lists several of them.
Rule 3: an error of a node is the run's outcome, not an error of the testbed; it is recorded and judged.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class TestbedError(Exception):
    """Base; never raised itself."""

    __test__ = False  # the name starts with "Test", which pytest would collect
    exit_code = 1

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems: Sequence[str] = problems


class UsageError(TestbedError):
    """The scenario, an override or an argument is wrong; nothing was started."""

    exit_code = 2


class MachineCannotError(TestbedError):
    """This machine lacks what was asked for; nothing was started."""

    exit_code = 3


class RunBrokenError(TestbedError):
    """A process of the run died, refused or stayed silent: the run ends with outcome "failed"."""


class InterruptedRunError(TestbedError):
    """The user asked to stop before there was a migration to cancel."""


class RecordError(TestbedError):
    """A run directory is incomplete or damaged: it cannot be judged."""

    exit_code = 2


def did_you_mean(wrong: str, known: Iterable[str], written: str = "{}") -> str:
    """For the end of a message: "; did you mean 'x'?", or "" where nothing known is like it.

    `written`: what is to be typed for a known name, which stands in it as {}.
    """
    close = get_close_matches(wrong, list(known), n=1)
    return f"; did you mean '{written.format(close[0])}'?" if close else ""
