"""The [hosts] section of a scenario: where the hosts live and what each of them may use."""

from collections.abc import Iterator
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from testbed.documents import Model
from testbed.units import format_bytes, parse_bytes

Bytes = Annotated[int, BeforeValidator(parse_bytes)]

# Beside guest RAM a host has two Python processes with gRPC and numpy, chunks in flight and page hashes.
PROCESSES_BYTES: Final = 384 << 20
CONTEXT = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$|^$"


class Hosts(Model):
    """Where the hosts of a run live."""

    kind: Literal["local", "docker"] = "local"
    guest_memory_max: Bytes = 0  # no host takes a larger guest in; 0: as much as the machine has
    # Of each container; 0: no limit. A host that needs more than its memory is killed by the kernel.
    memory: Bytes = 0
    cpus: Annotated[float, Field(ge=0.0, le=1024.0)] = 0.0
    # TLS between the hosts, with a certificate authority made for the run; unless said: between containers.
    tls: bool | None = None
    # Docker contexts; "": DOCKER_HOST, else the current context.
    context_source: Annotated[str, Field(pattern=CONTEXT)] = ""
    context_dest: Annotated[str, Field(pattern=CONTEXT)] = ""

    def context_of(self, origin: str) -> str:
        """The Docker context of a host."""
        return self.context_dest if origin == "dest" else self.context_source

    @property
    def encrypted(self) -> bool:
        """Whether the link between the hosts is encrypted."""
        return self.kind == "docker" if self.tls is None else self.tls


def host_conflicts(hosts: Hosts, guest_kind: str, memory_bytes: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the section, as (path, problem)."""
    if hosts.kind == "local":
        for key in ("memory", "cpus", "context_source", "context_dest"):
            if getattr(hosts, key):
                yield f"hosts.{key}", "is for containers: it needs hosts.kind = 'docker' (--hosts docker)"
        return
    if guest_kind == "linux":
        yield "guest.kind", "a Linux guest runs on this machine only: it needs hosts.kind = 'local'"
    needed = memory_bytes + PROCESSES_BYTES
    if hosts.memory and hosts.memory < memory_bytes:
        yield (
            "hosts.memory",
            (
                f"{format_bytes(hosts.memory)} cannot hold a {format_bytes(memory_bytes)} guest; "
                f"{format_bytes(needed)} leave room for the processes"
            ),
        )
