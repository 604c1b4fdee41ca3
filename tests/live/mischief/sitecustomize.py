"""Makes a process of a run misbehave, as BALLAST_MISCHIEF says: "host.NAME", "guest.NAME", comma-separated.

Rule 1: this folder is on PYTHONPATH of a test's own children only; the product knows nothing of it.
Rule 2: "a:" or "b:" in front of a name keeps a mischief to that host ("a:host.wrong_skip"); else both have it.
Rule 3: a name that does not exist ends the process: a sabotage that is not there must not look like a pass.
"""

import importlib
import os
import sys

MODULES = {"host": "bad_hosts", "guest": "bad_guests"}
PROGRAMS = {"host": "host", "guest_agent": "guest"}


def _who():
    """(kind, name) of this process, by its command line; None for anything but a node or an agent."""
    words = sys.orig_argv
    if "-m" not in words or "--name" not in words:
        return None
    program = PROGRAMS.get(words[words.index("-m") + 1])
    return None if program is None else (program, words[words.index("--name") + 1])


def _misbehave():
    who = _who()
    if who is None:
        return
    for wish in filter(None, os.environ.get("BALLAST_MISCHIEF", "").split(",")):
        host, _, mischief = wish.rpartition(":")
        kind, name = mischief.split(".")
        if kind == who[0] and host in ("", who[1]):
            getattr(importlib.import_module(MODULES[kind]), name)()


try:
    _misbehave()
except BaseException as error:  # noqa: BLE001 - site would only print it and go on, well-behaved
    sys.stderr.write(f"mischief failed: {error!r}\n")
    os._exit(70)
