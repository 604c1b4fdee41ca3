"""Between real containers: every byte at both interfaces is explained, without offload and over a lossy link."""

import pytest

from testbed.record.run_record import load
from tests.containers.beds import objects_of, tiny
from tests.live.commands import Commands
from tests.live.runs import perform

pytestmark = [pytest.mark.containers, pytest.mark.usefixtures("image")]


def test_without_offload_the_interfaces_count_what_a_cable_carries(tmp_path, engine):
    run = perform(tmp_path, tiny("migration.skip=none", "link.offload=false"))
    assert run.result.verdict == "valid", run.result.reasons
    account = run.result.account
    assert (account.wire_source, account.offload) == ("interface", False)
    assert abs(account.unexplained_forward_bytes) < 0.002 * account.wire_forward_bytes
    assert abs(account.cable_forward_bytes - account.wire_forward_bytes) < 0.01 * account.wire_forward_bytes
    assert abs(account.dest_received_bytes - account.wire_forward_bytes) < 0.01 * account.wire_forward_bytes
    headers = sum(layer.forward_bytes for layer in account.layers if layer.name.startswith(("TCP/IP", "Eth")))
    assert 0.04 < headers / account.wire_forward_bytes < 0.06
    assert not objects_of(engine, load(run.run_dir.path).manifest["run"])


def test_a_session_by_hand_over_a_link_that_loses_packets(tmp_path, engine):
    ballast = Commands(tmp_path)
    session = ballast.up("--hosts", "docker", "--set", "migration.skip=none")
    mine = ("--session", str(session))
    added = ballast.json("fault", "add", "loss", "host=b", "share=3%", *mine)
    there = ballast.json("migrate", *mine)
    healed = ballast.json("fault", "heal", str(added["fault"]["id"]), *mine)
    assert there["result"]["verdict"] == "valid", there["result"]["reasons"]
    account = there["result"]["account"]
    assert healed["counted"]["packets"] > 0
    assert account["retransmitted_bytes"] > 0
    assert abs(account["unexplained_forward_bytes"]) < 0.01 * account["wire_forward_bytes"]

    ballast.run("fault", "add", "disconnect", "host=a", *mine)
    ballast.run("fault", "heal", "2", *mine)
    back = ballast.json("migrate", "--to", "a", *mine)
    assert back["result"]["verdict"] == "valid", back["result"]["reasons"]
    down = ballast.json("down", *mine)
    assert (down["exit_code"], down["legs"]) == (0, 2)
    assert not objects_of(engine, load(session).manifest["run"])
