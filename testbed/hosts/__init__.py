"""Where the two hosts of a run live; today as processes on this machine (local.py)."""
