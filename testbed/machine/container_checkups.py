"""What `ballast doctor` says about hosts in containers.

Rule 1: an engine is asked, not its command; what it can limit it says itself.
Rule 2: nothing is pulled and nothing is built here: what a first run will have to do is said instead.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from docker.errors import DockerException

from testbed.errors import TestbedError
from testbed.hosts.container import DEVICE
from testbed.hosts.engine import LOOK_S, connect, innermost
from testbed.hosts.image import MADE_BASE, PULLED_BASE, ImageSources, base_of, freshness
from testbed.machine.checkup import Checkup

if TYPE_CHECKING:
    from testbed.hosts.engine import Engine

CONTAINERS = "--hosts docker"


def examine() -> list[Checkup]:
    """The engine, and what there is of everything that containers need."""
    device = _device()
    try:
        engine = connect(timeout_s=LOOK_S)
    except TestbedError as error:
        found, _, remedy = str(error).partition("; ")
        return [_engine(found, remedy), device, _base_maker()]
    try:
        facts = engine.client.info()
        return [_engine_found(engine, facts), _limits(facts), _image(engine), device, _base_maker()]
    except (DockerException, OSError) as error:
        return [_engine(innermost(error), "look at the engine's log"), device, _base_maker()]
    finally:
        engine.close()


def _engine(found: str, remedy: str, *, ok: bool = False) -> Checkup:
    return Checkup(
        "Docker engine", ok=ok, required=False, found=found, needed_for=f"{CONTAINERS}; local runs do without",
        remedy=remedy,
    )  # fmt: skip


def _engine_found(engine: Engine, facts: dict[str, Any]) -> Checkup:
    cgroup = facts.get("CgroupVersion", "?")
    found = f"engine {engine.version}, cgroup v{cgroup}, {facts.get('Driver', '?')}, at {engine.address}"
    return _engine(found, "", ok=True)


def _limits(facts: dict[str, Any]) -> Checkup:
    missing = [
        word
        for word, key in (("memory", "MemoryLimit"), ("swap", "SwapLimit"), ("CPU quota", "CpuCfsQuota"))
        if not facts.get(key)
    ]
    return Checkup(
        "limits of containers",
        ok=not missing,
        required=False,
        found=f"no limit of {', '.join(missing)}" if missing else "memory, swap, CPU quota",
        needed_for="hosts.memory, hosts.cpus, the faults memory and slow",
        remedy="boot with cgroup_enable=memory swapaccount=1, or use cgroup v2",
    )


def _image(engine: Engine) -> Checkup:
    sources = ImageSources()
    try:
        reference, reason = freshness(engine.client, sources)
    except TestbedError as error:
        return Checkup("image of a host", False, False, str(error), CONTAINERS, "run ballast from a clone")
    base = base_of(engine.client)
    if not reason:
        found = f"{reference} is fresh"
    elif base == PULLED_BASE:
        found = f"{reason}; the first run pulls {PULLED_BASE} and builds it"
    else:
        found = f"{reason}; the first run builds it from {MADE_BASE}"
    return Checkup("image of a host", ok=True, required=False, found=found, needed_for=CONTAINERS)


def _device() -> Checkup:
    there = DEVICE.exists()
    return Checkup(
        str(DEVICE),
        ok=there,
        required=False,
        found="a device that containers can be given" if there else "is missing",
        needed_for=f"{CONTAINERS} with skip hint or both",
        remedy="use Linux 6.7 or newer with CONFIG_USERFAULTFD",
    )


def _base_maker() -> Checkup:
    there = shutil.which("debootstrap") is not None
    return Checkup(
        "debootstrap",
        ok=there,
        required=False,
        found="deploy/make-base-image can make a base image" if there else "not installed",
        needed_for=f"{CONTAINERS} where no image can be pulled",
        remedy="as root: apt-get install debootstrap",
    )
