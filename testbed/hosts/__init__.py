"""Where the hosts of a run live, behind host_handles.py: processes (local.py), containers (docker_hosts.py)."""
