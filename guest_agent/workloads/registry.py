"""The workloads by their scenario names.

Rule 1: a spec is the scenario's table as it stands: {"name": kind, option: value, ...}; it is saved with the
        guest, so that another host builds the same workload from it.
Rule 2: ids are positions in the list, from 1; a workload's name is its kind and its id.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from guest_agent.errors import WorkloadError
from guest_agent.frames import WORKLOAD_ID_MAX
from guest_agent.workloads.base import Workload
from guest_agent.workloads.build import Build
from guest_agent.workloads.files import Files
from guest_agent.workloads.freed import Freed
from guest_agent.workloads.idle import Idle
from guest_agent.workloads.kv import KeyValueStore
from guest_agent.workloads.options import Options
from guest_agent.workloads.retake import Retake
from guest_agent.workloads.writer import Writer

WORKLOADS: Final[Mapping[str, type[Workload]]] = {
    workload.kind: workload for workload in (Idle, Freed, Files, Writer, KeyValueStore, Build, Retake)
}


def build_workload(spec: Mapping[str, Any], workload_id: int) -> Workload:
    """Make one workload, not yet set up.

    Raises:
        WorkloadError: an unknown kind, an unknown option, or a value that is none.
    """
    if not 1 <= workload_id <= WORKLOAD_ID_MAX:
        raise WorkloadError(f"workload {workload_id}: ids are 1 to {WORKLOAD_ID_MAX}")
    values = dict(spec)
    kind = values.pop("name", None)
    if not isinstance(kind, str) or kind not in WORKLOADS:
        raise WorkloadError(f"workload {workload_id}: {kind!r} is none of {', '.join(sorted(WORKLOADS))}")
    name = f"{kind}-{workload_id}"
    options = Options(name, values)
    workload = WORKLOADS[kind](name, workload_id, options)
    options.finish()
    return workload


def build_workloads(specs: Sequence[Mapping[str, Any]]) -> list[Workload]:
    """Make the workloads of one guest, in the order of their specs; raises as build_workload()."""
    return [build_workload(spec, workload_id) for workload_id, spec in enumerate(specs, start=1)]
