"""Real interface counters at both ends, explained layer by layer; offloads on and off; a new interface midway."""

import pytest

from testbed.record.run_record import load
from tests.live.namespaced_hosts import live_in, needs_namespaces, network
from tests.live.runs import TINY, WRITER, perform, scenario

pytestmark = [pytest.mark.live, needs_namespaces]


def layers(account):
    return {layer.name.partition(":")[0]: layer.forward_bytes for layer in account.layers}


@pytest.mark.parametrize(("offload", "per_cent"), [(True, (0.0, 1.5)), (False, (4.0, 6.0))])
def test_every_byte_at_the_interface_has_its_layer(tmp_path, monkeypatch, offload, per_cent):
    with network(offload=offload) as joined:
        live_in(joined, monkeypatch)
        run = perform(tmp_path, scenario("hosts.tls=true", "migration.skip=none", text=TINY))
    assert run.judgement.reasons == []
    account = run.result.account
    assert run.result.bytes.wire_source == account.wire_source == "interface"
    assert account.offload is offload
    assert abs(account.unexplained_forward_bytes) < 0.002 * account.wire_forward_bytes
    assert layers(account)["TLS"] > 0
    # What the interfaces add to the TCP stream depends on who cuts the packets.
    headers = layers(account)["TCP/IP"] + layers(account)["Ethernet"]
    least, most = per_cent
    assert least < 100 * headers / account.wire_forward_bytes < most
    assert (
        abs(account.cable_forward_bytes - account.wire_forward_bytes) < 0.01 * account.cable_forward_bytes
        or offload
    )
    # Both ends, per round and in total, and the witness outside.
    assert abs(account.dest_received_bytes - account.wire_forward_bytes) < 0.01 * account.wire_forward_bytes
    others = layers(account).get("other connections of the host", 0)
    carried = account.wire_forward_bytes - headers - others - account.retransmitted_bytes
    assert abs(account.dest_stream_bytes - carried) < 0.005 * carried
    record = load(run.run_dir.path)
    sent = {
        event.fields["round"]: event.fields["wire_bytes"] for event in record.all("round_ended", "source")
    }
    received = {event.fields["round"] for event in record.all("round_received", "dest")}
    assert sent.keys() == received
    told = {event.fields["step"] for event in record.all("wire_received", "dest")}
    assert told == {"commit", "forget"}, "also where the last call does not come through"
    for part in run.result.rounds:
        assert abs(part.dest_wire_bytes - part.wire_bytes) < 0.01 * part.wire_bytes + 32_768
    seen = record.last("wire_seen").fields["hosts"]
    assert seen["source"]["tx_bytes"] >= account.wire_forward_bytes
    assert seen["dest"]["rx_bytes"] >= account.dest_received_bytes


def test_an_interface_that_goes_takes_no_count_with_it(tmp_path, monkeypatch):
    """As `docker network disconnect` and `connect` do: the second interface counts from 0."""
    with network() as joined:
        live_in(joined, monkeypatch)
        changed = []

        def change_it(event):
            if event.name == "progress" and event.fields["payload_bytes"] > 8 << 20 and not changed:
                changed.append(event)
                joined.part()
                joined.join()

        chosen = scenario("hosts.tls=true", "migration.bandwidth=16MiB/s", "migration.skip=none", text=WRITER)
        run = perform(tmp_path, chosen, watch=change_it)
    assert changed
    account = run.result.account
    assert run.result.outcome == "completed", run.result.outcome_reason
    assert run.judgement.reasons == []
    assert account.wire_forward_bytes > run.result.bytes.payload
    assert abs(account.dest_received_bytes - account.wire_forward_bytes) < 0.02 * account.wire_forward_bytes
