"""What guests do: each workload is one module, seeded, and able to check itself against the oracle."""

from guest_agent.workloads.base import Guest, Workload
from guest_agent.workloads.registry import WORKLOADS, build_workload, build_workloads

__all__ = ["WORKLOADS", "Guest", "Workload", "build_workload", "build_workloads"]
