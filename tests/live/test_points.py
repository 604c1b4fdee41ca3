"""Points in real nodes: each is reached, in the order of the protocol, and the node stands there until told."""

import pytest

from testbed.errors import RunBrokenError
from tests.live.runs import WRITER, Bed, scenario

HOLD_MS = 30_000
# Where each stands on the way of a migration that completes.
WAY = (
    ("source", "started.recorded"),
    ("source", "open.sent"),
    ("dest", "receiving.recorded"),
    ("source", "hint.open"),
    ("source", "round 1"),
    ("source", "round 1 50%"),
    ("source", "round 2"),
    ("source", "stop_copy"),
    ("source", "last_harvest"),
    ("source", "saved"),
    ("source", "prepare.sent"),
    ("dest", "prepare.received"),
    ("dest", "prepared.recorded"),
    ("source", "committing.recorded"),
    ("source", "commit.sent"),
    ("dest", "commit.received"),
    ("dest", "committed.recorded"),
    ("dest", "guest.run"),
    ("source", "completed.recorded"),
)


@pytest.mark.live
def test_every_point_of_a_migration_holds_its_node_until_it_is_released(tmp_path):
    with Bed(tmp_path, scenario(text=WRITER)) as bed:
        nodes = {"source": bed.source, "dest": bed.dest}
        with pytest.raises(RunBrokenError, match="there is no point 'commit'; known points: round N"):
            bed.source.arm_point("commit", HOLD_MS)
        for origin, point in WAY:
            nodes[origin].arm_point(point, HOLD_MS)
        since_ns = bed.begin()
        for origin, point in WAY:
            bed.wait("point_reached", origin, since_ns=since_ns, point=point)
            assert nodes[origin].release_point(point), f"nobody was held at {point}"
        ended = bed.wait("migration_ended", "source", since_ns=since_ns)
        assert ended.fields["outcome"] == "completed"
        bed.check(bed.dest)


@pytest.mark.live
def test_a_migration_that_is_cancelled_while_it_is_held_burns_its_attempt_at_a_point_of_its_own(tmp_path):
    with Bed(tmp_path, scenario()) as bed:
        bed.source.arm_point("stop_copy", HOLD_MS)
        bed.source.arm_point("aborted.recorded", HOLD_MS)
        since_ns = bed.begin()
        bed.wait("point_reached", "source", since_ns=since_ns, point="stop_copy")
        bed.source.cancel("while it is held")
        bed.source.release_point("stop_copy")
        bed.wait("point_reached", "source", since_ns=since_ns, point="aborted.recorded")
        assert bed.source.guest_status().state == "paused"
        bed.source.release_point("aborted.recorded")
        ended = bed.wait("migration_ended", "source", since_ns=since_ns)
        assert ended.fields["outcome"] == "cancelled"
        bed.guest_is_back()
