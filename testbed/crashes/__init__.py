"""Crashes at every step of the protocol, in real processes: what must come of each (table.py), and doing it."""
