"""Dice by name: every part of a world draws from its own stream, so that a new part shifts nobody else's."""

from __future__ import annotations

import hashlib
import random


def stream(seed: int, name: str) -> random.Random:
    """The dice of one part of the world with this seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))
