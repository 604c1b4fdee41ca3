"""The workloads by their scenario names.

Rule 1: a spec is the scenario's table as it stands: {"name": kind, option: value, ...}; it is saved with the
        guest, so that another host builds the same workload from it.
Rule 2: ids are positions in the list, from 1; the second workload of a kind is named kind-2.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from guest_agent.errors import WorkloadError
from guest_agent.frames import WORKLOAD_ID_MAX
from guest_agent.workloads.base import Workload
from guest_agent.workloads.files import Files
from guest_agent.workloads.freed import Freed
from guest_agent.workloads.idle import Idle
from guest_agent.workloads.kv import KeyValueStore
from guest_agent.workloads.options import Options
from guest_agent.workloads.writer import Writer

WORKLOADS: Final[Mapping[str, type[Workload]]] = {
    workload.kind: workload for workload in (Idle, Freed, Files, Writer, KeyValueStore)
}


def build_workloads(specs: Sequence[Mapping[str, Any]]) -> list[Workload]:
    """Make the workloads of one guest, not yet set up.

    Raises:
        WorkloadError: an unknown kind, an unknown option, or a value that is none.
    """
    if len(specs) > WORKLOAD_ID_MAX:
        raise WorkloadError(f"{len(specs)} workloads, at most {WORKLOAD_ID_MAX} are possible")
    seen: Counter[str] = Counter()
    workloads = []
    for workload_id, spec in enumerate(specs, start=1):
        values = dict(spec)
        kind = values.pop("name", None)
        if not isinstance(kind, str) or kind not in WORKLOADS:
            raise WorkloadError(f"workload {workload_id}: {kind!r} is none of {', '.join(sorted(WORKLOADS))}")
        seen[kind] += 1
        name = kind if seen[kind] == 1 else f"{kind}-{seen[kind]}"
        options = Options(name, values)
        workloads.append(WORKLOADS[kind](name, workload_id, options))
        options.finish()
    return workloads
