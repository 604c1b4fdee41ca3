"""Engines: found by context, refused with what to do, on this machine or reached over a network."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.cli import app
from testbed.errors import MachineCannotError, UsageError
from testbed.hosts.engine import connect
from testbed.hosts.image import base_of
from testbed.record.run_record import load
from tests.containers.beds import tiny
from tests.live.runs import perform, waited_for

pytestmark = pytest.mark.containers
NOBODY = 65534


class Forwarder:
    """A TCP port of this machine that leads to a unix socket: an engine as it is reached on another machine."""

    def __init__(self, path):
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets, self._threads = [], []
        self._start(self._accept)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in tuple(self._sockets):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *self._sockets):
            one.close()

    def _start(self, target, *arguments):
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._path)
            self._sockets += [near, far]
            self._start(self._carry, near, far)
            self._start(self._carry, far, near)

    def _carry(self, one, other):
        try:
            while piece := one.recv(1 << 16):
                other.sendall(piece)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return


@pytest.fixture
def contexts(tmp_path, monkeypatch):
    """Makes contexts as `docker context create` does, in a configuration of the test's own."""
    folder = tmp_path / "docker"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))

    def make(name, address):
        from docker.context import ContextAPI  # noqa: PLC0415 - reads DOCKER_CONFIG

        ContextAPI.create_context(name, host=address, skip_tls_verify=True)

    return make


@pytest.fixture
def far(engine, contexts):
    """A context of the same engine, reached by TCP: nothing of this machine can be shared with its containers."""
    forwarder = Forwarder(engine.address.removeprefix("unix://"))
    contexts("far", f"tcp://127.0.0.1:{forwarder.port}")
    yield "far"
    forwarder.close()


@pytest.fixture
def second_engine(engine, image, contexts):
    """A context of an engine of its own, which lives as long as the test and has this one's images."""
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("needs an engine of its own: be root, and apt-get install docker.io")
    # Its paths are short: the engine's own sockets are below them.
    with tempfile.TemporaryDirectory(prefix="ballast-", dir="/var/tmp") as folder:
        contexts("second", f"unix://{folder}/engine.sock")
        command = [
            "dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec",
            "--pidfile", f"{folder}/pid", "--host", f"unix://{folder}/engine.sock",
            "--bridge", "none", "--iptables=false",  # published ports by proxy: rules of two engines would mix
        ]  # fmt: skip
        with (
            Path(folder, "log").open("wb") as log,
            subprocess.Popen(command, stdout=log, stderr=log) as started,
        ):
            try:
                waited_for(lambda: answers("second", started), "the second engine to answer")
                second = connect("second")
                for name in (image, base_of(engine.client)):
                    second.client.images.load(engine.client.images.get(name).save(named=name))
                second.close()
                yield "second"
            finally:
                started.terminate()
        unmount_below(folder)


def answers(context, process):
    assert process.poll() is None, "the second engine did not start"
    try:
        connect(context).close()
    except MachineCannotError:
        return False
    return True


def unmount_below(folder):
    places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in sorted((one for one in places if one.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", place], check=True)


@pytest.mark.usefixtures("nothing_left")
def test_two_engines_are_two_networks_and_a_published_port(tmp_path, engine, contexts, second_engine):
    contexts("first", engine.address)
    chosen = ("hosts.context_source=first", f"hosts.context_dest={second_engine}")
    run = perform(tmp_path / "runs", tiny(*chosen))
    assert run.result.verdict == "valid", run.result.reasons
    made = list(load(run.run_dir.path).all("network_made"))
    assert [event.fields["internal"] for event in made] == [False, False]
    assert len({event.fields["subnet"] for event in made}) == 2
    second = connect(second_engine)
    assert not second.client.containers.list(all=True)
    assert not second.client.networks.list(filters={"label": "ballast.run"})
    second.close()


@pytest.mark.usefixtures("image", "nothing_left")
def test_two_contexts_of_one_engine_make_one_network(tmp_path, engine, contexts):
    contexts("here", engine.address)
    contexts("there", engine.address)
    run = perform(tmp_path / "runs", tiny("hosts.context_source=here", "hosts.context_dest=there"))
    assert run.result.verdict == "valid", run.result.reasons
    assert len(list(load(run.run_dir.path).all("network_made"))) == 1


@pytest.mark.usefixtures("image", "nothing_left")
def test_an_engine_elsewhere_gets_files_by_copy_and_is_controlled_through_itself(tmp_path, engine, far):
    assert not connect_and_close(far).local
    run = perform(tmp_path / "runs", tiny(f"hosts.context_source={far}", f"hosts.context_dest={far}"))
    assert run.result.verdict == "valid", run.result.reasons
    files = {
        path.relative_to(run.run_dir.node("dest")).as_posix() for path in run.run_dir.node("dest").rglob("*")
    }
    assert files >= {"beats", "oracle", "journal.sqlite", "node.json"}, "evidence was fetched"
    assert not [name for name in files if "pem" in name], "certificates were not"
    assert {path.stat().st_uid for path in run.run_dir.node("dest").rglob("*")} == {os.getuid()}
    assert not engine.client.volumes.list(filters={"label": "ballast.run"})


def connect_and_close(context):
    found = connect(context)
    found.close()
    return found


def test_an_unknown_context_is_usage_and_says_how_to_see_the_known_ones(contexts, engine):
    contexts("here", engine.address)
    with pytest.raises(UsageError, match=r"no Docker context 'nowhere'; 'docker context ls'"):
        connect("nowhere")
    scenario = Path(__file__).parents[2] / "scenarios/kv-only.toml"
    command = ["run", str(scenario), "--hosts", "docker", "--context-dest", "nowhere"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "no Docker context 'nowhere'" in result.stderr


def test_an_engine_that_is_away_is_3_and_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    scenario = Path(__file__).parents[2] / "scenarios/kv-only.toml"
    result = CliRunner().invoke(app, ["run", str(scenario), "--hosts", "docker", "--out", str(tmp_path)])
    assert result.exit_code == 3
    assert f"no engine answers at {tmp_path}/none.sock: No such file" in result.stderr
    assert "apt-get install docker.io" in result.stderr


def test_an_engine_without_permission_is_3_and_says_whom_to_join(engine, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("be root: nobody else can become somebody who may not")
    monkeypatch.setenv("DOCKER_HOST", engine.address)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(MachineCannotError, match="usermod -aG docker") as refused:
            connect()
    finally:
        os.seteuid(0)
    assert refused.value.exit_code == 3


def test_doctor_knows_the_engine(engine):
    found = CliRunner().invoke(app, ["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert checks["Docker engine"]["ok"]
    assert engine.version in checks["Docker engine"]["found"]
