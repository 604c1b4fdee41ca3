"""Quantities in faults: shares of packets, and moments of a migration.

Rule 1: a moment is a time after the migration was requested ("500ms"), a round with an optional percentage of its
        pages ("round 2", "round 1 50%"), or a point of the protocol ("commit.sent", host/points.py).
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, BeforeValidator

from host.points import side_of
from testbed.units import parse_duration_ms, parse_rate

DurationMs = Annotated[int, BeforeValidator(parse_duration_ms)]
BytesPerSecond = Annotated[int, BeforeValidator(parse_rate)]

_PERCENT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TIME: Final = re.compile(r"\d+(?:\.\d+)?\s*(?:ms|s|min)")


def parse_share(value: object) -> float:
    """0.01 of "1%" or 0.01. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        share = float(value)
    elif isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())) is not None:
        share = float(match[1]) / 100
    else:
        raise ValueError(f'{value!r} is no share; write "1%" or 0.01')
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is not between 0% and 100%")
    return share


def not_nothing(share: float) -> float:
    """Refuses 0: a fault that does nothing is a mistake."""
    if share == 0:
        raise ValueError("is 0%: nothing would happen")
    return share


Share = Annotated[float, BeforeValidator(parse_share)]
SomeShare = Annotated[float, BeforeValidator(parse_share), AfterValidator(not_nothing)]


def parse_moment(value: object) -> str:
    """The moment as it is written, once it is known to be one. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f'{value!r} is no moment; write "500ms", "round 2", "round 1 50%" or a point')  # noqa: TRY004
    text = " ".join(value.split())
    if text and not _TIME.fullmatch(text):
        side_of(text)
    return text


def moment_ms(moment: str) -> int | None:
    """The time of a moment that is one, in milliseconds; None for rounds and points."""
    return parse_duration_ms(moment) if _TIME.fullmatch(moment) else None
