"""The programs of Debian that a Linux guest is made of, and what lacks here.

Rule 1: nothing is downloaded and nothing built: what a distribution ships is what is tested against.
Rule 2: what is missing is named by the package that brings it.
"""

from __future__ import annotations

import lzma
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from linux_guest.errors import PackagesMissingError

KERNEL: Final = "linux.uml"
MODULES: Final = Path("/usr/lib/uml/modules")
BALLOON_MODULE: Final = "kernel/drivers/virtio/virtio_balloon.ko"
DYNAMIC_LOADER: Final = b"/ld-linux"  # a static program names none
WHOLE_XSTATE_VERSION: Final = (6, 13)  # from here on User-Mode Linux keeps all of a process's extended state
AMX: Final = "amx_tile"


@dataclass(frozen=True, slots=True)
class Programs:
    """What was found. `version` is the kernel's, as (6, 1)."""

    kernel: Path
    busybox: Path
    balloon_module: Path
    version: tuple[int, ...]

    def module_bytes(self) -> bytes:
        """The balloon driver as the kernel loads it."""
        data = self.balloon_module.read_bytes()
        return lzma.decompress(data) if self.balloon_module.suffix == ".xz" else data

    @property
    def loses_xstate(self) -> bool:
        """Whether this kernel cannot keep this processor's extended state (see launch.py)."""
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE)
        has_amx = flags is not None and AMX in flags[1].split()
        return has_amx and self.version < WHOLE_XSTATE_VERSION


def find() -> Programs:
    """The programs. Raises PackagesMissingError with the packages that are not installed."""
    kernel = shutil.which(KERNEL)
    module = _balloon_module()
    busybox = _static_busybox()
    missing = []
    if kernel is None or module is None:
        missing.append("user-mode-linux")
    if busybox is None:
        missing.append("busybox-static")
    if kernel is None or module is None or busybox is None:
        raise PackagesMissingError(tuple(missing))
    release = module.relative_to(MODULES).parts[0]
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    return Programs(Path(kernel), busybox, module, version)


def missing() -> str:
    """Why there can be no Linux guest here, or ""."""
    try:
        find()
    except PackagesMissingError as error:
        return str(error)
    return ""


def _balloon_module() -> Path | None:
    found = [path for end in ("", ".xz") for path in MODULES.glob(f"*/{BALLOON_MODULE}{end}")]
    return max(found, default=None)


def _static_busybox() -> Path | None:
    found = shutil.which("busybox")
    if found is None:
        return None
    with Path(found).open("rb") as file:
        return None if DYNAMIC_LOADER in file.read(4096) else Path(found)
