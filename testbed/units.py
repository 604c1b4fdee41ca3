"""Quantities as people write them: "2GiB", "1Gbit/s", "300ms", "2000pages/s".

Rule 1: a plain integer is already in the base unit: bytes, bytes per second, milliseconds, pages per second.
Rule 2: a quantity is exact or refused: "1.5GiB" is a whole number of bytes, "0.3B" is an error.
Rule 3: binary prefixes (KiB) are powers of 1024, decimal ones (KB, Mbit) powers of 1000; nothing is guessed.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

PAGE_BYTES: Final = 4096

_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS: Final[Mapping[str, Fraction]] = {
    unit: Fraction(factor) for unit, factor in {"B": 1, **_BINARY, **_DECIMAL}.items()
}
RATE_UNITS: Final[Mapping[str, Fraction]] = {
    **{f"{unit}/s": factor for unit, factor in SIZE_UNITS.items()},
    **{f"{prefix}bit/s": Fraction(factor, 8) for prefix, factor in
       {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}.items()},
}  # fmt: skip
DURATION_UNITS: Final[Mapping[str, Fraction]] = {
    "ms": Fraction(1), "s": Fraction(1000), "min": Fraction(60_000),
}  # fmt: skip
PAGE_RATE_UNITS: Final[Mapping[str, Fraction]] = {"pages/s": Fraction(1)}

_QUANTITY = re.compile(r"(?P<number>\d+(?:_\d+)*(?:\.\d+)?)\s*(?P<unit>[A-Za-z/]+)")


def parse_quantity(value: object, units: Mapping[str, Fraction], base: str) -> int:
    """Returns `value` in the base unit; raises ValueError with a line that names the accepted units."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        problem = f"{value!r} is no quantity; write a number with a unit such as {_examples(units)}"
        raise ValueError(problem)  # noqa: TRY004 - pydantic collects ValueError and lets TypeError through
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{value} {base} is negative")
        return value
    text = value.strip()
    if text.isdecimal():
        return int(text)
    match = _QUANTITY.fullmatch(text)
    if match is None or match["unit"] not in units:
        raise ValueError(
            f"{value!r} is not understood; use one of {', '.join(units)} as in {_examples(units)}"
        )
    amount = Fraction(match["number"].replace("_", "")) * units[match["unit"]]
    if amount.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of {base}")
    return int(amount)


def parse_bytes(value: object) -> int:
    """A size in bytes."""
    return parse_quantity(value, SIZE_UNITS, "bytes")


def parse_pages(value: object) -> int:
    """A number of pages: a plain integer counts pages, a text with a unit is a size of whole pages."""
    if isinstance(value, str) and not value.strip().isdecimal():
        size = parse_bytes(value)
        if size % PAGE_BYTES:
            raise ValueError(f"{value!r} is not a whole number of {PAGE_BYTES}-byte pages")
        return size // PAGE_BYTES
    return parse_quantity(value, SIZE_UNITS, "pages")


def parse_rate(value: object) -> int:
    """Bytes per second; 0 and "unlimited" mean no limit."""
    if value == "unlimited":
        return 0
    return parse_quantity(value, RATE_UNITS, "bytes per second")


def parse_duration_ms(value: object) -> int:
    """Milliseconds."""
    return parse_quantity(value, DURATION_UNITS, "milliseconds")


def parse_page_rate(value: object) -> int:
    """Pages per second."""
    return parse_quantity(value, PAGE_RATE_UNITS, "pages per second")


def format_bytes(count: float) -> str:
    """A size for people, three figures: 734 MiB, 1.46 GiB."""
    amount, unit = float(count), "B"
    for larger in _BINARY:
        if amount < 1000:
            break
        amount, unit = amount / 1024, larger
    return f"{_three_figures(amount) if unit != 'B' else int(amount)} {unit}"


def format_ms(milliseconds: float) -> str:
    """A duration for people: 4.1 ms, 620 ms, 2.97 s."""
    if milliseconds < 1000:
        return f"{_three_figures(milliseconds)} ms"
    return f"{_three_figures(milliseconds / 1000)} s"


def _three_figures(amount: float) -> str:
    decimals = 0 if amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{amount:,.{decimals}f}"


def _examples(units: Mapping[str, Fraction]) -> str:
    for unit, example in (("GiB", '"2GiB"'), ("Gbit/s", '"1Gbit/s"'), ("ms", '"300ms"')):
        if unit in units:
            return example
    return '"2000pages/s"'
