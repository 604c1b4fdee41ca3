"""Where the hosts of a run live: one interface (port.py), processes of this machine (local.py) behind it."""
