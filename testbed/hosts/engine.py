"""A Docker engine: reached by context or DOCKER_HOST, or one line that says why not and what to do.

Rule 1: a named context is that context; without a name DOCKER_HOST decides, then the current context, as `docker`
        does.
Rule 2: the version of the API is negotiated with every engine.
Rule 3: an engine is on this machine when it is reached by a unix socket: then directories can be shared with its
        containers, and their processes and network namespaces are seen from here.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import docker
from docker.context import ContextAPI
from docker.errors import DockerException
from docker.tls import TLSConfig

from testbed.errors import MachineCannotError, RunBrokenError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from docker import DockerClient

CALL_S: Final = 60  # creating a container takes tenths of a second, on a busy disk some
LOOK_S: Final = 3  # whether an engine answers at all
CONNECTIONS_MAX: Final = 64  # each process of a run keeps one for its output
UNIX: Final = "unix://"
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
DEFAULT_SOCKET: Final = "unix:///var/run/docker.sock"  # the engine's own default
HOW_TO_GET_ONE: Final = (
    "start a Docker engine (as root: apt-get install docker.io iptables), or set DOCKER_HOST"
)


@dataclass(frozen=True, slots=True)
class Engine:
    """A connected engine."""

    client: DockerClient
    address: str
    context: str
    engine_id: str
    version: str
    memory_bytes: int  # of its machine

    @property
    def local(self) -> bool:
        """Whether it is on this machine."""
        return self.address.startswith((UNIX, "http+unix://"))

    @property
    def machine(self) -> str:
        """The machine's name or address, for those who connect to ports that it publishes; "" for this one."""
        name = "" if self.local else urlsplit(self.address).hostname or ""
        return "" if name in LOOPBACK else name

    def close(self) -> None:
        """Gives the connections back."""
        self.client.close()


def connect(context: str = "", *, timeout_s: int = CALL_S) -> Engine:
    """The engine of a context, or the one that `docker` would take.

    Raises:
        UsageError: there is no such context.
        MachineCannotError: it does not answer, or not to us.
    """
    address, tls = _endpoint(context)
    _look(address)
    try:
        client = docker.DockerClient(
            base_url=address,
            version="auto",
            timeout=timeout_s,
            max_pool_size=CONNECTIONS_MAX,
            tls=tls,
            use_ssh_client=address.startswith("ssh://"),
        )
    except (DockerException, OSError) as error:
        raise MachineCannotError(f"no engine answers at {address}: {innermost(error)}") from error
    try:
        facts = client.info()
        version = str(client.version()["Version"])
    except (DockerException, OSError) as error:
        client.close()
        raise MachineCannotError(f"no engine answers at {address}: {innermost(error)}") from error
    # Engines of one machine may share their id (its key is the machine's); what is in their data root is their own.
    engine_id = f"{facts.get('ID', address)} {facts.get('DockerRootDir', '')}"
    return Engine(client, address, context, engine_id, version, int(facts["MemTotal"]))


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns an engine's refusal during a run into a line."""
    try:
        yield
    except (DockerException, OSError) as error:
        raise RunBrokenError(f"{what}: {innermost(error)}") from error


def innermost(error: BaseException) -> str:
    """The reason under the layers that HTTP libraries put around it: as cause, context or argument."""
    explanation = getattr(error, "explanation", None)
    if explanation:
        return str(explanation).splitlines()[0]
    while True:
        inner = error.__cause__ or error.__context__
        inner = inner or next((part for part in error.args if isinstance(part, BaseException)), None)
        if inner is None:
            break
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def _endpoint(context: str) -> tuple[str, TLSConfig | bool]:
    if not context and (chosen := os.environ.get("DOCKER_HOST")):
        told_folder, verify = os.environ.get("DOCKER_CERT_PATH"), bool(os.environ.get("DOCKER_TLS_VERIFY"))
        if not (verify or told_folder):
            return chosen, False
        folder = Path(told_folder or Path.home() / ".docker")
        certificates = (str(folder / "cert.pem"), str(folder / "key.pem"))
        ca = str(folder / "ca.pem") if verify else None
        return chosen, TLSConfig(client_cert=certificates, ca_cert=ca, verify=verify)
    try:
        found: Any = ContextAPI.get_context(context or os.environ.get("DOCKER_CONTEXT") or None)
    except Exception as error:  # the SDK lets errors of broken contexts out as they come
        raise UsageError(f"the Docker context '{context or 'current'}' cannot be read: {error}") from error
    if found is None:
        raise UsageError(f"there is no Docker context '{context}'; 'docker context ls' lists them")
    return str(found.Host or DEFAULT_SOCKET).replace("http+unix://", UNIX), found.TLSConfig or False


def _look(address: str) -> None:
    """A unix socket is looked at first: the SDK says neither which one nor what to do, and leaves it open."""
    if not address.startswith(UNIX):
        return
    path = address.removeprefix(UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(LOOK_S)
            connection.connect(path)
    except PermissionError as error:
        raise MachineCannotError(
            f"{path}: you may not use this engine; join its group (usually: sudo usermod -aG docker $USER, then "
            "log in again), or be root"
        ) from error
    except OSError as error:
        raise MachineCannotError(
            f"no engine answers at {path}: {error.strerror or error}; {HOW_TO_GET_ONE}"
        ) from error
