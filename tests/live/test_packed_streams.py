"""A whole migration by three streams, compressed, with deltas, below a bandwidth limit: whole, and all counted."""

import pytest

from testbed.record.run_record import load
from tests.live.runs import WRITER, perform, scenario

pytestmark = pytest.mark.live

RATE_BYTES_PER_S = 32 << 20


def test_streams_compression_deltas_and_a_limit_together(tmp_path) -> None:
    chosen = scenario(
        "migration.streams=3",
        "migration.compression=zstd",
        "migration.delta_cache=32MiB",
        "migration.skip=none",
        "migration.bandwidth=32MiB/s",
        text=WRITER,
    )
    run = perform(tmp_path, chosen)
    result = run.result
    assert result.verdict == "valid", result.reasons
    assert result.streams == 3
    compression, delta = result.compression, result.delta
    assert compression.kind == "zstd"
    assert compression.chunks > compression.given_up_chunks
    assert compression.bytes_out < compression.bytes_in
    assert min(compression.cpu_seconds_source, compression.cpu_seconds_dest) > 0
    assert delta.pages > 0, "the writer changes a few words a page"
    assert delta.cache_hits >= delta.pages
    layers = {layer.name: layer.forward_bytes for layer in result.account.layers}
    assert layers["compression"] < 0
    assert result.bytes.wire_tx < result.bytes.payload
    for event in load(run.run_dir.path).rounds:
        seconds = event.fields["duration_ms"] / 1e3
        burst_bytes = 6 << 20  # what a first message and the sockets' buffers may hold
        assert event.fields["wire_bytes"] <= RATE_BYTES_PER_S * seconds + burst_bytes, event.fields
