"""An agent that is lost is found again: the same one as it is, another one as the journal says."""

import threading
from types import SimpleNamespace

import pytest

from host.agent_link import Hello
from host.errors import AgentLost
from host.event_log import EventLog
from host.local_guest import LocalGuest

PATIENCE_S = 10.0


class Link:
    """A link that finds what is there: `pid` 0 is nobody."""

    on_notify = on_lost = None

    def __init__(self):
        self.pid, self.connected, self.changed, self.closed = 1, False, threading.Condition(), False

    def connect(self, timeout):
        with self.changed:
            if not self.changed.wait_for(lambda: self.pid or self.closed, timeout) or self.closed:
                raise AgentLost("nobody")
            self.connected = True

    def hello(self):
        if not self.connected:
            raise AgentLost("no connection")
        return Hello(1, "ballast", "standby", 0, 64, 0, 0, 0, False, 0, {}, self.pid, False)

    def becomes(self, pid):
        """The process ends, or breaks the link, and this one is there instead."""
        with self.changed:
            self.connected, self.pid = False, pid
            self.changed.notify_all()
        self.on_lost("it broke")

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@pytest.fixture(name="bed")
def fixture_bed():
    events, link, recovered = EventLog("dest"), Link(), []
    guest = LocalGuest(link, events)
    bed = SimpleNamespace(events=events, link=link, guest=guest, recovered=recovered)
    guest.start(lambda: recovered.append(link.pid))
    yield bed
    guest.stop()
    events.close()


def waited(bed, name, times=1):
    """Until this event was told so often."""
    found = 0
    for fact in bed.events.watch(lambda: True):
        found += fact.name == name
        if found == times:
            return


def test_an_agent_that_was_started_again_is_taken_in_and_recovered(bed):
    waited(bed, "guest_attached")
    bed.link.becomes(0)
    bed.link.becomes(2)
    waited(bed, "guest_attached", 2)
    assert bed.guest.hello().pid == 2
    assert bed.recovered == [1, 2]


def test_a_link_that_merely_broke_is_found_again_and_nothing_is_recovered_twice(bed):
    waited(bed, "guest_attached")
    bed.link.becomes(1)
    waited(bed, "guest_link_found")
    assert bed.recovered == [1]


def test_a_migration_finds_out_about_its_guest_before_another_agent_is_taken_in(bed):
    waited(bed, "guest_attached")
    heard = threading.Event()
    bed.guest.listen_for_loss(lambda _: heard.set())
    bed.link.becomes(2)
    assert heard.wait(PATIENCE_S)
    assert bed.guest._pid == 1
    bed.guest.listen_for_loss(None)
    waited(bed, "guest_attached", 2)
    assert bed.guest._pid == 2


def test_a_recovery_that_the_agent_did_not_answer_is_tried_again():
    events, link, tries = EventLog("dest"), Link(), []

    def recover():
        tries.append(1)
        if len(tries) == 1:
            raise AgentLost("it did not answer in time")

    guest = LocalGuest(link, events)
    guest.start(recover)
    waited(SimpleNamespace(events=events), "guest_attached")
    guest.stop()
    events.close()
    assert len(tries) == 2
