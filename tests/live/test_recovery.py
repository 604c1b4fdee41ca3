"""A link that is cut in the middle of a real migration: it goes on where it was, or the guest is unharmed."""

from migration.pages import PAGE_BYTES
from testbed.record.run_record import load
from tests.live.relay import Relay
from tests.live.runs import TINY, Bed, guest_is_whole, perform, scenario

HOLD_MS = 30_000
CHUNK_BYTES_MAX = (1 << 20) + (64 << 10)  # pages, their hashes, the head, gRPC's and HTTP/2's frames
SLOW = ("migration.bandwidth=24MiB/s", "migration.skip=none")  # 64 MiB: time enough to be cut in the middle


class CutInTheMiddle:
    """Watches a run's history: cuts the relay at some pages, heals it when `heals` has happened."""

    def __init__(self, relay, heals):
        self.relay = relay
        self.heals = heals
        self.done = False

    def __call__(self, event):
        if not self.done and event.name == "progress" and event.fields["sent_pages"] > 4000:
            self.done = True
            self.relay.cut()
        elif event.origin == "source" and event.name == self.heals:
            self.relay.heal()


def test_a_link_that_comes_back_goes_on_without_sending_acknowledged_pages_again(tmp_path, monkeypatch):
    with Relay(monkeypatch) as relay:
        chosen = scenario(*SLOW, "migration.link_timeout=20s", "migration.streams=2")
        run = perform(tmp_path, chosen, CutInTheMiddle(relay, heals="link_lost"))
    result, record = run.result, load(run.run_dir.path)
    assert result.outcome == "completed", result.outcome_reason
    assert result.verdict == "valid", result.reasons
    assert (result.recoveries.count, result.attempts) == (1, 1)
    assert result.recoveries.paused_ms > 0
    guest_is_whole(run, "dest")
    # The destination refuses a chunk that it has: what it had stored, and what came after the cut, is all there is.
    resumed, received = record.last("link_resumed", "dest"), record.last("pages_received", "dest")
    stored, chunks = resumed.fields["stored_chunks"], received.fields["chunks"]
    assert stored > 0
    assert sum(relay.forward_bytes[1:]) <= (chunks - stored) * CHUNK_BYTES_MAX
    counted = record.ended.fields["bytes"]
    assert counted["resent_pages"] == result.recoveries.resent_pages
    assert result.recoveries.resent_pages * PAGE_BYTES < sum(part.payload_bytes for part in result.rounds) / 2
    assert [one.decision for one in result.decisions][:2] == ["reconnect", "go_on"]


def test_a_link_that_stays_lost_cancels_and_a_retry_is_complete(tmp_path, monkeypatch):
    with Relay(monkeypatch) as relay:
        chosen = scenario(*SLOW, "migration.link_timeout=300ms", "migration.retries=1")
        run = perform(tmp_path, chosen, CutInTheMiddle(relay, heals="migration_ended"))
    result, record = run.result, load(run.run_dir.path)
    first, second = (event.fields for event in record.all("migration_ended", "source"))
    assert (first["outcome"], first["cause"]) == ("cancelled", "link")
    assert "link_timeout = 300 ms" in first["reason"]
    assert second["outcome"] == "completed"
    assert (result.outcome, result.verdict, result.attempts) == ("completed", "valid", 2), result.reasons
    guest_is_whole(run, "dest")


AGENT_AWAY = """
[[fault]]
kind = "kill"
what = "guest_agent"
host = "dest"
at = "prepare.received"
restart = true
for = "500ms"
"""


def test_a_budget_of_retries_outlasts_a_guest_agent_that_is_started_again(tmp_path):
    chosen = scenario("migration.retries=5", "migration.retry_pause=500ms", text=TINY + AGENT_AWAY)
    run = perform(tmp_path, chosen)
    result, record = run.result, load(run.run_dir.path)
    assert (result.outcome, result.verdict) == ("completed", "valid"), (result.outcome_reason, result.reasons)
    told = [event.fields for event in record.all("migration_retried")]
    assert [fields["pause_ms"] for fields in told] == [500 << number for number in range(len(told))]
    assert result.attempts == 1 + len(told) > 1
    guest_is_whole(run, "dest")


def test_a_rehearsal_whose_answer_was_lost_is_answered_again(tmp_path, monkeypatch):
    with Relay(monkeypatch) as relay, Bed(tmp_path, scenario()) as bed:
        bed.dest.arm_point("prepare.received", HOLD_MS)
        since_ns = bed.begin(link_timeout_ms=20_000, rehearsal=True)
        bed.wait("point_reached", "dest", since_ns=since_ns, point="prepare.received")
        relay.cut()
        bed.wait("link_lost", "source", since_ns=since_ns)
        bed.dest.release_point("prepare.received")
        bed.wait("rehearsed", "dest", since_ns=since_ns)
        relay.heal()
        ended = bed.wait("migration_ended", "source", since_ns=since_ns)
        assert ended.fields["outcome"] == "rehearsal", ended.fields["reason"]
        bed.guest_is_back()


def test_by_default_a_link_that_comes_back_in_some_seconds_goes_on(tmp_path, monkeypatch):
    with Relay(monkeypatch) as relay:
        run = perform(tmp_path, scenario(*SLOW), CutInTheMiddle(relay, heals="link_lost"))
    result = run.result
    assert (result.outcome, result.verdict) == ("completed", "valid"), (result.outcome_reason, result.reasons)
    assert result.recoveries.count == 1


def test_a_link_lost_while_the_guest_stands_still(tmp_path, monkeypatch):
    """Cut for good before the last pages: the guest runs on. Cut behind PREPARED: Prepare is asked again."""
    with Relay(monkeypatch) as relay, Bed(tmp_path, scenario()) as bed:
        bed.source.arm_point("last_harvest", HOLD_MS)
        since_ns = bed.begin(link_timeout_ms=20_000, link_timeout_paused_ms=300)
        bed.wait("point_reached", "source", since_ns=since_ns, point="last_harvest")
        assert bed.source.guest_status().state == "paused"
        relay.cut()
        bed.source.release_point("last_harvest")
        ended = bed.wait("migration_ended", "source", since_ns=since_ns)
        assert (ended.fields["outcome"], ended.fields["cause"]) == ("cancelled", "link")
        assert "link_timeout_paused = 300 ms" in ended.fields["reason"]
        bed.guest_is_back()

        relay.heal()
        bed.dest.arm_point("prepared.recorded", HOLD_MS)
        since_ns = bed.begin(link_timeout_ms=20_000)
        bed.wait("point_reached", "dest", since_ns=since_ns, point="prepared.recorded")
        relay.cut()
        lost = bed.wait("link_lost", "source", since_ns=since_ns)
        assert lost.fields["phase"] == "PREPARING"
        relay.heal()
        bed.dest.release_point("prepared.recorded")
        ended = bed.wait("migration_ended", "source", since_ns=since_ns)
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        assert ended.fields["recoveries"]["count"] == 1
        assert ended.fields["recoveries"]["resent_pages"] == 0
        bed.check(bed.dest)
