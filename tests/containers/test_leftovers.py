"""What a killed `ballast` leaves is found and removed, what lives or is not ours stays; images and subnets."""

import json
import os
import shutil
import signal
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from testbed.hosts import labels, subnets
from testbed.hosts.image import ImageSources, freshness
from tests.containers.beds import objects_of

pytestmark = pytest.mark.containers
ROOT = Path(__file__).parents[2]
SLOW = """
[guest]
memory = "64MiB"
[[guest.workload]]
name = "idle"
[hosts]
kind = "docker"
[run]
settle = "60s"
"""


@pytest.fixture
def foreign(engine):
    """A network that looks like ours by its name, and by all labels but the owner."""
    marks = {
        labels.RUN: "0badf00d",
        labels.RUNTIME: "/nonexistent/ballast-0badf00d",
        labels.OWNER: "0@elsewhere",
    }
    network = engine.client.networks.create("ballast-0badf00d", labels=marks, internal=True)
    yield network
    network.remove()


@pytest.mark.usefixtures("image", "foreign")
def test_a_killed_ballast_leaves_nothing_that_clean_does_not_remove(tmp_path, engine, bed):
    scenario = tmp_path / "slow.toml"
    scenario.write_text(SLOW)
    command = [sys.executable, "-m", "testbed", "run", str(scenario), "--out", str(tmp_path / "runs")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with run:
        started = None
        for line in run.stderr:
            event = json.loads(line)
            started = event["fields"]["run"] if event["name"] == "run_started" else started
            if event["name"] == "guest_ready":
                break
        os.kill(run.pid, signal.SIGKILL)
    names = objects_of(engine, started)
    assert names == [f"ballast-{started}", f"ballast-{started}-a", f"ballast-{started}-b"]

    told = clean("--dry-run")
    assert all(any(name in line for line in told) for name in names)
    assert objects_of(engine, started) == names, "a dry run does nothing"
    told = clean()
    assert all(any(name in line for line in told) for name in names)
    assert not objects_of(engine, started)
    assert not [line for line in clean("--dry-run") if started in line]

    assert objects_of(engine, bed.run_id), "a run that lives keeps what it has"
    assert bed.dest.guest_status().state == "standby"
    assert objects_of(engine, "0badf00d") == ["ballast-0badf00d"], "what is another owner's stays"


def clean(*options):
    command = [sys.executable, "-m", "testbed", "clean", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)["removed"]


def test_an_image_is_fresh_until_a_source_changes(tmp_path, engine, image):
    sources = ImageSources()
    assert freshness(engine.client, sources) == (image, "")
    copy = tmp_path / "checkout"
    for path in sources.files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    assert freshness(engine.client, ImageSources(copy)) == (image, ""), (
        "where the checkout is does not matter"
    )
    with (copy / "host/node.py").open("a") as file:
        file.write("# changed\n")
    reference, reason = freshness(engine.client, ImageSources(copy))
    assert reference != image
    assert reason == "stale: the sources changed"


def test_a_runs_network_avoids_every_network_of_the_engine(engine, bed):
    taken = list(subnets.of_engine(engine.client.networks.list()))
    own = next(
        IPv4Network(config["Subnet"])
        for network in engine.client.networks.list(names=[f"ballast-{bed.run_id}"])
        for config in network.attrs["IPAM"]["Config"]
    )
    assert own in taken
    free = list(subnets.candidates([*taken, *subnets.of_routes()], "seed"))
    assert own not in free
    assert len(free) >= 500
    assert not list(subnets.candidates([subnets.RANGE], "seed"))
    assert free != list(subnets.candidates([*taken, *subnets.of_routes()], "another seed"))
