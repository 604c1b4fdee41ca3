"""How a container and this machine share sockets, evidence and certificates.

Rule 1: on an engine of this machine directories are shared: the record is written where it belongs, as it happens.
Rule 2: on an engine elsewhere the container has volumes: what it needs is copied in before it starts, what it wrote
        is copied out (`collect`), and its control socket is reached through the engine (relay.py).
Rule 3: certificates have a directory of their own, which is never copied out.
"""

from __future__ import annotations

import io
import os
import tarfile
from typing import TYPE_CHECKING, Any, Final, Protocol

from testbed.errors import RunBrokenError
from testbed.hosts.container import DATA, TLS, inside_user
from testbed.hosts.container_process import INSIDE
from testbed.hosts.engine import Engine, told
from testbed.hosts.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from testbed.hosts.container import RunContainer

MODE_DIRECTORY: Final = 0o700
MODE_FILE: Final = 0o600


class Sharing(Protocol):
    """One host's share of files."""

    @property
    def mounts(self) -> Mapping[str, str]:
        """What is mounted where inside: directories of this machine, or volumes of the engine."""
        ...

    @property
    def control(self) -> str:
        """Where this machine reaches the node's control socket."""
        ...

    def fill(self, container: RunContainer) -> None:
        """Before it starts."""
        ...

    def open(self, container: RunContainer) -> None:
        """Once it runs."""
        ...

    def collect(self, container: RunContainer) -> None:
        """What the host wrote so far is in the run directory afterwards."""
        ...

    def close(self) -> None:
        """When the container is gone."""
        ...


class SharedDirectories:
    """With an engine of this machine."""

    def __init__(self, sockets: Path, data: Path, tls: Path | None) -> None:
        self._sockets = sockets
        self._data = data
        self._directories = {sockets: INSIDE, data: DATA} | ({} if tls is None else {tls: TLS})
        sockets.mkdir(mode=MODE_DIRECTORY)

    @property
    def mounts(self) -> Mapping[str, str]:
        """The directories."""
        return {os.fspath(here): there for here, there in self._directories.items()}

    @property
    def control(self) -> str:
        """The node's own socket."""
        return f"unix:{self._sockets / 'control.sock'}"

    def fill(self, container: RunContainer) -> None:
        """They belong to the user inside."""
        for path in self._directories:
            _give(path, inside_user())
            for file in path.iterdir():
                _give(file, inside_user())

    def open(self, container: RunContainer) -> None:
        """Nothing to do."""

    def collect(self, container: RunContainer) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """What was written belongs to the user of the run."""
        for path in (self._data, *self._data.rglob("*")):
            _give(path, os.getuid())


class CopiedVolumes:
    """With an engine of another machine."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        relay_path: Path,
        data: Path,
        tls: Path | None,
        labels: Mapping[str, str],
    ) -> None:
        self._engine = engine
        self._sources = {DATA: data} | ({} if tls is None else {TLS: tls})
        self._relay_path = relay_path
        self._relay: Relay | None = None
        self._volumes: dict[str, Any] = {}
        for inside in self._sources:
            volume = f"{name}-{inside.rpartition('/')[2]}"
            with told(f"the volume {volume} cannot be made"):
                self._volumes[inside] = engine.client.volumes.create(volume, labels=dict(labels))

    @property
    def mounts(self) -> Mapping[str, str]:
        """The volumes."""
        return {str(volume.name): inside for inside, volume in self._volumes.items()}

    @property
    def control(self) -> str:
        """The relay's socket."""
        return f"unix:{self._relay_path}"

    def fill(self, container: RunContainer) -> None:
        """Copies in what is there."""
        for inside, source in self._sources.items():
            with told(f"{inside} of {container.name} cannot be filled"):
                if not container.handle.put_archive(inside, _packed(source)):
                    raise RunBrokenError(f"{inside} of {container.name} cannot be filled")

    def open(self, container: RunContainer) -> None:
        """The relay."""
        user = inside_user()
        self._relay = Relay(self._relay_path, container.handle, user=f"{user}:{user}")

    def collect(self, container: RunContainer) -> None:
        """Copies the evidence out, over what was copied before."""
        with told(f"the evidence of {container.name} cannot be fetched"):
            pieces, _ = container.handle.get_archive(f"{DATA}/.")
            fetched = io.BytesIO(b"".join(pieces))
        with tarfile.open(fileobj=fetched) as archive:
            archive.extractall(self._sources[DATA], filter=_own)  # noqa: S202 - filtered

    def close(self) -> None:
        """The relay and the volumes go."""
        if self._relay is not None:
            self._relay.close()
        for volume in self._volumes.values():
            with told(f"the volume {volume.name} cannot be removed"):
                volume.remove()


def _packed(directory: Path) -> bytes:
    """A directory and its files as the user inside has them."""

    def given(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = inside_user()
        member.uname = member.gname = ""
        member.mode = MODE_DIRECTORY if member.isdir() else MODE_FILE
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory, arcname=".", filter=given)
    return buffer.getvalue()


def _own(member: tarfile.TarInfo, destination: str) -> tarfile.TarInfo | None:
    """Only plain files and directories below the destination, as the user of the run."""
    if not (member.isfile() or member.isdir()):
        return None
    safe = tarfile.data_filter(member, destination)
    return safe.replace(uid=os.getuid(), gid=os.getgid(), uname="", gname="", deep=False)


def _give(path: Path, user: int) -> None:
    if os.getuid() == 0 and not path.is_symlink():
        os.chown(path, user, user)
