"""How a guest agent process ends: asked to, with its parent, by a failing guest, by bad input; nothing stays."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live.agent_host import MEMORY_BYTES, WORKLOADS, Host, fixture_guest, fixture_hosts, wait_until

hosts = fixture_hosts
guest = fixture_guest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(guest: Host, number: int) -> None:
    guest.process.send_signal(number)
    assert guest.process.wait(20) == 0
    assert not guest.socket.exists()
    left = {path.name for path in guest.directory.iterdir()} - {"a.vhost"}
    assert left == {"a.beats", "a.oracle", "a.log", "a.json"}


def test_it_dies_with_the_process_that_started_it(hosts: Callable[..., Host], tmp_path: Path) -> None:
    host: Host = hosts("a", None)
    command = [sys.executable, "-m", "guest_agent", "--die-with-parent", "--standby", "--seed", "1"]
    command += ["--name", "a", "--memory", str(MEMORY_BYTES), "--vhost-socket", str(host.vhost)]
    command += ["--agent-socket", str(host.socket), "--beats", str(host.beats), "--oracle", str(host.oracle)]
    program = f"import subprocess, time; subprocess.Popen({command!r}).wait()"
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([sys.executable, "-c", program], stderr=log) as p,
    ):
        host.connect()
        pid = host.link.hello().pid
        p.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the agent ends")
    assert not host.socket.exists()


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_failing_guest_thread_ends_the_agent_loudly(hosts: Callable[..., Host]) -> None:
    host: Host = hosts("a", WORKLOADS).start_agent(beats=Path("/dev/full"))
    host.start_node()
    assert host.process.wait(20) == 1
    log = host.log.read_text()
    assert "guest_thread_failed" in log
    assert "No space left" in log
    wait_until(lambda: bool(host.news), "the node is told")
    assert host.news[-1][0] == "workload_failed"
    assert host.news[-1][1]["thread"] == "beats"
    assert not host.socket.exists()


def test_a_failing_boot_ends_the_agent_loudly(hosts: Callable[..., Host]) -> None:
    host: Host = hosts("a", WORKLOADS).start_agent(oracle=Path("/dev/full"))
    assert host.process.wait(20) == 1
    assert '"thread": "boot"' in host.log.read_text()
    assert not host.socket.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "expected"),
        ('{"workloads": [1]}', "expected"),
        ('{"workloads": [{"name": "no-such"}]}', "no-such"),
        ('{"workloads": [{"name": "kv", "records": 10, "operations_per_second": 1, "colour": 1}]}', "colour"),
    ],
)
def test_bad_workloads_are_a_usage_error(hosts: Callable[..., Host], content: str, reason: str) -> None:
    host: Host = hosts("a", [])
    spec = host.directory / "bad.json"
    spec.write_text(content)
    host.start_agent(workloads=spec)
    assert host.process.wait(20) == 2
    assert reason in host.log.read_text()
    assert not host.socket.exists()


@pytest.mark.parametrize("memory_bytes", [0, -4096, 4097, 1 << 18, 1 << 50])
def test_an_impossible_memory_size_is_a_usage_error(hosts: Callable[..., Host], memory_bytes: int) -> None:
    host: Host = hosts("a", WORKLOADS, memory_bytes=memory_bytes).start_agent()
    assert host.process.wait(20) == 2
    assert "--memory" in host.log.read_text()


def test_a_second_agent_on_the_same_socket_is_refused(guest: Host) -> None:
    second = Host(guest.directory, "a", None)
    second.log = guest.directory / "second.log"
    second.start_agent()
    assert second.process.wait(20) == 1
    assert "another agent" in second.log.read_text()
    assert guest.link.hello().state == "running"
