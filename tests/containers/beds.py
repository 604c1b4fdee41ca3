"""Hosts in containers for tests: the live tests' bed, in an engine.

Rule 1: the guest is tiny; what a test needs more of it says by overrides.
"""

from testbed.hosts.clean import look
from testbed.hosts.leftovers import LeftObject
from tests.live.runs import TINY, Bed, scenario

DOCKER = ("hosts.kind=docker",)


def tiny(*overrides, text=TINY, expect="completed"):
    """A scenario of a 64 MiB guest on two containers."""
    return scenario(*DOCKER, *overrides, text=text, expect=expect)


def module_bed(out, *overrides):
    """Two hosts that several tests use; a context manager. The hosts are `bed.hosts.source` and `.dest`."""
    return Bed(out, tiny(*overrides))


def objects_of(engine, run_id):
    """Names of the containers, networks and volumes with this run's label."""
    chosen = {"label": f"ballast.run={run_id}"}
    found = [
        *engine.client.containers.list(all=True, filters=chosen),
        *engine.client.networks.list(filters=chosen),
        *engine.client.volumes.list(filters=chosen),
    ]
    return sorted(one.name for one in found)


def left_behind():
    """What runs that are over left in the engine; runs of others that are under way do not count."""
    found, problems = look()
    assert not problems
    return {str(left) for left in found if isinstance(left, LeftObject)}
