"""The vCPU state: all that a guest is besides its RAM.

Rule 1: at most 16 KiB at any memory size: no page lists; who has which pages is read from the frame table.
Rule 2: the bytes are canonical (sorted keys, no spaces): equal states have equal bytes and equal digests.
Rule 3: bytes of another host are checked in full before anything is built from them (RestoreError).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import xxhash

from guest_agent.errors import RestoreError

__all__ = ["STATE_BYTES_MAX", "STATE_VERSION", "VcpuState", "WorkloadState", "digest_hex"]

STATE_VERSION = 1
STATE_BYTES_MAX = 16 * 1024  # DESIGN 3.10: small at 1 and at 8 GiB, or a page list has slipped in
WORKLOADS_MAX = 64  # their states share the 16 KiB of STATE_BYTES_MAX
RINGS = 5


@dataclass(frozen=True, slots=True)
class WorkloadState:
    """One workload: what it was asked to be, and its registers (small, JSON-able)."""

    spec: dict[str, Any]
    registers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class VcpuState:
    """The saved guest. `clock_ns` is guest time; `driver` and `rings` are the balloon driver's."""

    guest_epoch: int
    pages: int
    seed: int
    clock_ns: int
    driver: dict[str, Any]
    rings: tuple[dict[str, Any], ...]
    ring_bases: tuple[int, ...]
    workloads: tuple[WorkloadState, ...]

    def to_bytes(self) -> bytes:
        """The canonical bytes, at most STATE_BYTES_MAX."""
        document = {
            "version": STATE_VERSION,
            "guest_epoch": self.guest_epoch,
            "pages": self.pages,
            "seed": self.seed,
            "clock_ns": self.clock_ns,
            "driver": self.driver,
            "rings": list(self.rings),
            "ring_bases": list(self.ring_bases),
            "workloads": [{"spec": w.spec, "registers": w.registers} for w in self.workloads],
        }
        state = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        assert len(state) <= STATE_BYTES_MAX, f"the vCPU state grew to {len(state)} bytes"
        return state

    @classmethod
    def from_bytes(cls, state: bytes) -> VcpuState:
        """Parse and check a saved state.

        Raises:
            RestoreError: too long, not JSON, another version, or a field missing or of the wrong kind.
        """
        if len(state) > STATE_BYTES_MAX:
            raise RestoreError(f"vCPU state of {len(state)} bytes, at most {STATE_BYTES_MAX} are allowed")
        try:
            document = json.loads(state)
        except (ValueError, RecursionError) as error:
            raise RestoreError(f"vCPU state is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise RestoreError("vCPU state is not an object")
        if document.get("version") != STATE_VERSION:
            raise RestoreError(f"vCPU state of version {document.get('version')!r}, not {STATE_VERSION}")
        bases = _list(document, "ring_bases", RINGS, RINGS)
        return cls(
            guest_epoch=_integer(document, "guest_epoch"),
            pages=_integer(document, "pages"),
            seed=_integer(document, "seed"),
            clock_ns=_integer(document, "clock_ns"),
            driver=_object(document, "driver"),
            rings=tuple(_item(ring, "rings") for ring in _list(document, "rings", RINGS, RINGS)),
            ring_bases=tuple(_integer({"ring_bases": base}, "ring_bases", 0xFFFF) for base in bases),
            workloads=tuple(
                WorkloadState(_object(_item(w, "workloads"), "spec"), _object(w, "registers"))
                for w in _list(document, "workloads", 0, WORKLOADS_MAX)
            ),
        )


def digest_hex(state: bytes) -> str:
    """xxh3_64 of the state bytes, 16 hex digits: what `restore` confirms."""
    return xxhash.xxh3_64_hexdigest(state)


def _integer(document: dict[str, Any], key: str, most: int = (1 << 64) - 1) -> int:
    value = document.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise RestoreError(f"vCPU state: {key} is {value!r}, not an integer of 0..{most}")
    return value


def _object(document: dict[str, Any], key: str) -> dict[str, Any]:
    return _item(document.get(key), key)


def _item(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RestoreError(f"vCPU state: {key} is not an object")
    return value


def _list(document: dict[str, Any], key: str, least: int, most: int) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise RestoreError(f"vCPU state: {key} is not a list of {least}..{most} items")
    return value
