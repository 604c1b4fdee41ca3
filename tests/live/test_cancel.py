"""A wish to cancel at every point of the protocol: the guest is back and nothing is left, or it was too late."""

import pytest

from host.points import side_of
from tests.live.runs import WRITER, Bed, misbehave, scenario, waited_for

pytestmark = pytest.mark.live

HOLD_MS = 30_000
REVERSIBLE = (
    "started.recorded", "open.sent", "receiving.recorded", "hint.open", "round 1 50%", "round 2", "stop_copy",
    "last_harvest", "saved", "prepare.sent", "prepare.received", "prepared.recorded",
)  # fmt: skip
TOO_LATE = ("committing.recorded", "commit.sent", "commit.received", "committed.recorded", "guest.run")


def cancelled_at(bed, point):
    """(what whoever cancelled was answered, how the attempt ended)."""
    held = bed.source if side_of(point) == "source" else bed.dest
    held.arm_point(point, HOLD_MS)
    since_ns = bed.begin()
    bed.wait("point_reached", side_of(point), since_ns=since_ns, point=point)
    reply = bed.source.cancel(f"at {point}")
    held.release_point(point)
    return reply, bed.wait("migration_ended", "source", since_ns=since_ns).fields


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """The thread that looks at wishes is held: the answer is what the phase promises, and that at once."""
    misbehave(monkeypatch, "a:host.impatient")


def test_until_committing_a_wish_brings_the_guest_back_and_leaves_nothing_behind(tmp_path):
    with Bed(tmp_path, scenario(text=WRITER)) as bed:
        for point in REVERSIBLE:
            reply, ended = cancelled_at(bed, point)
            assert (reply.effective, ended["outcome"]) == (True, "cancelled"), (point, reply, ended["reason"])
            assert (ended["reason"], ended["cause"]) == (f"at {point}", "request")
            bed.guest_is_back()
            # It may have had an Open or a Prepare at hand that the Abort overtook: then it is told once more.
            waited_for(lambda: bed.dest.guest_status().state == "standby", f"the destination after {point}")
        ended = bed.migrate()
        assert ended.fields["outcome"] == "completed", ended.fields["reason"]
        bed.check(bed.dest)


@pytest.mark.parametrize("point", TOO_LATE)
def test_afterwards_a_wish_is_refused_and_the_destination_decides(tmp_path, point):
    with Bed(tmp_path, scenario()) as bed:
        reply, ended = cancelled_at(bed, point)
        assert (reply.effective, ended["outcome"]) == (False, "completed"), (reply, ended["reason"])
        bed.wait("cancel_refused", "source")
        bed.check(bed.dest)
