"""Hosts in containers for tests: the live tests' bed, in an engine.

Rule 1: the guest is tiny; what a test needs more of it says by overrides.
"""

from tests.live.runs import TINY, Bed, scenario

DOCKER = ("hosts.kind=docker",)


def tiny(*overrides, text=TINY, expect="completed"):
    """A scenario of a 64 MiB guest on two containers."""
    return scenario(*DOCKER, *overrides, text=text, expect=expect)


def module_bed(out, *overrides):
    """Two hosts that several tests use; a context manager. The hosts are `bed.hosts.source` and `.dest`."""
    return Bed(out, tiny(*overrides))


def left_in(engine, run_id=None):
    """Names of containers and networks with a run's labels, of one run or of all."""
    chosen = {"label": "ballast.run" if run_id is None else f"ballast.run={run_id}"}
    containers = engine.client.containers.list(all=True, filters=chosen)
    return sorted(found.name for found in (*containers, *engine.client.networks.list(filters=chosen)))
