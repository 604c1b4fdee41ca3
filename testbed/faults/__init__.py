"""Faults: one file a kind, each with what it needs, how it is applied and how it is healed."""
