"""deploy/compose.yaml: the two hosts by hand, with the very commands that deploy/README.md tells a person."""

import json
import os
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from testbed.hosts.image import base_of
from tests.live.runs import waited_for

pytestmark = pytest.mark.containers
TOP = Path(__file__).parents[2]
SCRIPT = re.compile(r"<<'PY'\n(.*?)^PY$", re.DOTALL | re.MULTILINE)
COMMAND_S_MAX = 300  # a build included
HEALTHY_S_MAX = 90
IMAGE = "ballast-host:compose"
STATUS = """
import grpc
from migration.pb import node_pb2, node_pb2_grpc
with grpc.insecure_channel("unix:/run/ballast/control.sock") as channel:
    print(node_pb2_grpc.NodeStub(channel).GuestStatus(node_pb2.GuestStatusRequest()).state)
"""


def program():
    """`docker compose`, or the older docker-compose: both take what deploy/README.md says."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]) is None:
            continue
        if subprocess.run([*words, "version"], check=False, capture_output=True).returncode == 0:
            return words
    return pytest.skip("no compose here: apt-get install docker-compose")


class Project:
    """A compose project with a name of its own."""

    def __init__(self, engine):
        self.name = f"ballast-test-{uuid.uuid4().hex[:8]}"
        self._words = [*program(), "-p", self.name, "-f", "deploy/compose.yaml"]
        self._environ = {**os.environ, "DOCKER_HOST": engine.address, "BASE_IMAGE": base_of(engine.client)}

    def do(self, *words, said=""):
        done = subprocess.run(
            [*self._words, *words],
            check=False,  # what it said is shown
            cwd=TOP, env=self._environ, input=said, capture_output=True, text=True, timeout=COMMAND_S_MAX,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def asks(self, host, script):
        return self.do("exec", "-u", "10001", "-T", host, "python3", "-", said=script)


@pytest.fixture
def project(engine, image):  # noqa: ARG001 - its layers are what the build finds
    made = Project(engine)
    already = engine.client.images.list(IMAGE)
    yield made
    made.do("down", "--volumes", "--timeout", "5")
    if not already:
        engine.client.images.remove(IMAGE)
    assert not engine.client.containers.list(all=True, filters={"name": made.name})
    assert not engine.client.networks.list(names=[made.name])


def test_two_hosts_by_hand_as_the_readme_says(engine, project):
    project.do("up", "--build", "--detach")
    containers = engine.client.containers.list(filters={"name": project.name})
    assert len(containers) == 2

    def healthy():
        for container in containers:
            container.reload()
        return {one.attrs["State"]["Health"]["Status"] for one in containers} == {"healthy"}

    waited_for(healthy, "both hosts to be healthy", HEALTHY_S_MAX)
    assert project.asks("a", STATUS).strip() == "running"
    (script,) = SCRIPT.findall((TOP / "deploy/README.md").read_text())
    *_, last = project.asks("a", script).splitlines()
    name, _, fields = last.partition(" ")
    assert (name, json.loads(fields)["outcome"]) == ("migration_ended", "completed"), last
    assert project.asks("b", STATUS).strip() == "running"
    assert project.asks("a", STATUS).strip() != "running"
