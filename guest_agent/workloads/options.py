"""Options of a workload as the scenario writes them.

Rule 1: a value is a plain number in the base unit (bytes, pages a second, shares of 1) or text with a unit.
Rule 2: unknown keys, wrong types and values out of range are refused by name; nothing is adjusted silently.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from guest_agent.errors import WorkloadError

_NUMBER: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(.*?)\s*")
_SIZE_UNITS: Final = {
    "": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "kB": 10**3, "MB": 10**6, "GB": 10**9,
}  # fmt: skip
_RATE_UNITS: Final = {"": 1, "/s": 1, "pages/s": 1, "operations/s": 1}
_PLAIN: Final = {"": 1}


class Options:
    """One workload's options; each is taken once, and finish() refuses what nobody took."""

    def __init__(self, workload: str, values: Mapping[str, Any]) -> None:
        self._workload = workload
        self._left = dict(values)

    def share(self, key: str, default: float | None = None) -> float:
        """A share of 0..1."""
        value = self._number(key, default, _PLAIN)
        if value > 1:
            raise self._refuse(key, f"{value:g} is no share of 0..1")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A number of bytes, at least 1."""
        return self._whole(key, default, _SIZE_UNITS)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1."""
        return self._whole(key, default, _PLAIN)

    def rate(self, key: str, default: float | None = None) -> float:
        """So many a second, 0 or more."""
        return self._number(key, default, _RATE_UNITS)

    def text(self, key: str, default: str | None = None) -> str:
        """Text."""
        value = self._take(key, default)
        if not isinstance(value, str) or not value:
            raise self._refuse(key, f"{value!r} is no text")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """One of a few words."""
        value = self.text(key, default)
        if value not in choices:
            raise self._refuse(key, f"{value!r} is none of {', '.join(choices)}")
        return value

    def finish(self) -> None:
        """Raise WorkloadError when an option is left that the workload does not know."""
        if self._left:
            raise WorkloadError(f"workload {self._workload}: unknown options {', '.join(sorted(self._left))}")

    def _take(self, key: str, default: object) -> object:
        value = self._left.pop(key, default)
        if value is None:
            raise self._refuse(key, "missing")
        return value

    def _whole(self, key: str, default: int | None, units: Mapping[str, int]) -> int:
        value = self._number(key, default, units)
        if value < 1 or value != int(value):
            raise self._refuse(key, f"{value:g} is no whole number from 1 upwards")
        return int(value)

    def _number(self, key: str, default: float | None, units: Mapping[str, int]) -> float:
        value = self._take(key, default)
        factor = 1
        if isinstance(value, str):
            match = _NUMBER.fullmatch(value)
            if match is None or match[2] not in units:
                raise self._refuse(
                    key, f"{value!r} is no number with a unit of {', '.join(filter(None, units))}"
                )
            value, factor = float(match[1]), units[match[2]]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(key, f"{value!r} is no number")
        if not 0 <= value < float("inf"):
            raise self._refuse(key, f"{value!r} is out of range")
        return value * factor

    def _refuse(self, key: str, why: str) -> WorkloadError:
        return WorkloadError(f"workload {self._workload}: {key}: {why}")
