"""Makes a failing world small: the fewest faults under which the same invariant still breaks.

Rule 1: every candidate is a whole world, played from the beginning; nothing is guessed.
Rule 2: what counts is that the same invariant breaks, not that it breaks in the same words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from testbed.sim.simulation import Outcome, simulate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.sim.options import Options
    from testbed.sim.plants import Plant

WORLDS_MAX = 200  # some seconds; a schedule has a handful of faults


def invariant_of(violation: str) -> str:
    """What of a violation must stay the same."""
    return violation.partition(":")[0]


def minimised(failing: Outcome, plant: Plant) -> Outcome:
    """The smallest failing world found, with its transcript."""
    best, wanted, worlds = failing, invariant_of(failing.violation), 0
    shrinking = True
    while shrinking and worlds < WORLDS_MAX:
        shrinking = False
        for options in _smaller(best.options):
            worlds += 1
            outcome = simulate(failing.seed, plant, options=options)
            if outcome.violation and invariant_of(outcome.violation) == wanted:
                best, shrinking = outcome, True
                break
    return simulate(failing.seed, plant, options=best.options, transcript=True)


def _smaller(options: Options) -> Iterator[Options]:
    """The same world with one thing less, the largest steps first."""
    faults = options.faults
    if len(faults) > 2:
        half = len(faults) // 2
        yield options.with_faults(faults[:half])
        yield options.with_faults(faults[half:])
    for index in range(len(faults)):
        yield options.with_faults(faults[:index] + faults[index + 1 :])
    if options.legs > 1:
        yield replace(options, legs=1)
    if options.guest_lies:
        yield replace(options, guest_lies=False)
    if options.rehearsal:
        yield replace(options, rehearsal=False)
    if options.streams > 1:
        yield replace(options, streams=1)
