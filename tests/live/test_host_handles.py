"""Handles of a host's processes: killed, paused and started again, and the history has it all."""

import threading

import pytest

from tests.live.runs import Bed, scenario, waited_for

pytestmark = pytest.mark.live


def test_a_nodes_and_an_agents_handle_outlive_their_processes(tmp_path):
    with Bed(tmp_path, scenario()) as bed:
        dest = bed.hosts.dest
        address, first = dest.migration_address, dest.node.pid
        dest.node.kill()
        assert not dest.node.alive
        ended = bed.wait("process_ended", "testbed", process="dest-node")
        assert (ended.fields["asked"], ended.fields["status"]) == (False, "was killed by SIGKILL")

        dest.node.restart()
        assert dest.node.alive
        assert dest.node.pid != first
        assert dest.client.describe().migration_address == address, "the source finds it where it was"
        bed.wait("node_started", "dest", since_ns=ended.at_ns)

        dest.agent.kill()
        dest.node.kill()
        # A host that was started again: empty, with the journal it had. Who starts it may go: the kernel would kill
        # a process that asked to die with its parent at the end of the very thread that had started it.
        starting = threading.Thread(target=lambda: (dest.agent.restart(), dest.node.restart()))
        starting.start()
        starting.join()
        waited_for(lambda: dest.client.guest_status().state == "standby", "a new standby agent")

        bed.hosts.source.node.pause()
        bed.hosts.source.node.resume()
        assert bed.hosts.source.node.cpu_seconds() > 0
        assert bed.migrate().fields["outcome"] == "completed"
        bed.hosts.collect()
