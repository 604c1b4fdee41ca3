"""The hosts that a scenario asks for, by its `hosts.kind`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.hosts.local import LocalHosts

if TYPE_CHECKING:
    from testbed.history import History
    from testbed.host_handles import Hosts
    from testbed.hosts.runtime_dir import RuntimeDir
    from testbed.interrupt import Interrupt
    from testbed.record.run_dir import RunDir
    from testbed.scenario.document import Scenario


def open_hosts(
    scenario: Scenario,
    run_id: str,
    *,
    run_dir: RunDir,
    runtime: RuntimeDir,
    history: History,
    interrupt: Interrupt,
) -> Hosts:
    """The hosts, not started yet: entering them starts them, leaving them undoes everything."""
    if scenario.hosts.kind == "docker":
        from testbed.hosts.docker_hosts import DockerHosts  # noqa: PLC0415 - the SDK is slow to import

        return DockerHosts(
            scenario, run_id, run_dir=run_dir, runtime=runtime, history=history, interrupt=interrupt
        )
    return LocalHosts(
        scenario, run_id, run_dir=run_dir, runtime=runtime, history=history, interrupt=interrupt
    )
