"""What tests in containers share: an engine, an image of this checkout, and hosts that several tests use.

Rule 1: without an engine every test here is skipped with how to get one; a machine that lacks only the image
        gets it built once.
Rule 2: hosts are started once for a module (`bed`): a test leaves them as it found them.
Rule 3: nothing of a test's run is left in the engine: fixtures look.
"""

from pathlib import Path

import pytest

from testbed.errors import TestbedError
from testbed.hosts.engine import connect
from testbed.hosts.image import ensure
from tests.containers.beds import left_behind, module_bed, objects_of

IMAGE_S = 600  # the first test waits for the image


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(IMAGE_S))


@pytest.fixture(scope="session")
def engine():
    """The engine that `docker` would take."""
    try:
        found = connect(timeout_s=60)
    except TestbedError as error:
        pytest.skip(f"no containers here: {error}; where nothing can be pulled also: deploy/make-base-image")
    yield found
    found.close()


@pytest.fixture(scope="session")
def image(engine):
    """The reference of a fresh image of this checkout."""
    return ensure(engine.client, lambda *_, **__: None)


@pytest.fixture(scope="module")
def bed(engine, image, tmp_path_factory):  # noqa: ARG001
    """Two hosts in containers, the source's guest running; see beds.py."""
    with module_bed(tmp_path_factory.mktemp("bed")) as started:
        yield started
    assert not objects_of(engine, started.run_id)


@pytest.fixture
def nothing_left(engine):  # noqa: ARG001 - not without one
    """After the test no run that is over has more containers, networks and volumes than before."""
    before = left_behind()
    yield
    assert left_behind() <= before
