"""A driver that says whatever it likes, on the hint queue and in the configuration space, against a model.

The model knows one sentence: a hint counts from the guest's command with our newest id to its next command, or to
the end that we set, and never more of them than FLOOD_FACTOR times its memory.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from virtio.balloon import (
    CMD_ID_DONE,
    CMD_ID_FIRST,
    CMD_ID_STOP,
    CONFIG_BYTES,
    F_PAGE_POISON,
    PAGE_BYTES,
    QUEUE_HINT,
    BalloonConfig,
    mask,
)
from virtio.errors import GuestProtocolError
from virtio.hint_session import (
    FLOOD_FACTOR,
    HintRange,
    HintStarted,
    HintState,
    HintStopped,
    RejectedRange,
    StaleCommand,
    StaleRange,
)
from virtio.testing import MockHost

PAGES = 128
COUNTED = {"hint", "config_write", "poison_changed", "address_range", "length_zero", "direction"}
WORDS = st.sampled_from([0, 1, 2, 3, 5, 2**31, 2**32 - 1])
ADDRESSES = st.integers(0, (PAGES + 2) * PAGE_BYTES) | st.sampled_from([2**32, 2**63, 2**64 - PAGE_BYTES])
LENGTHS = st.sampled_from([1, 4, 4095, PAGE_BYTES, 8191, 16 * PAGE_BYTES, PAGES * PAGE_BYTES, 2**32 - 1])


class HostileGuest(RuleBasedStateMachine):
    @initialize(poison=st.booleans())
    def boot(self, poison):
        self.host = MockHost(PAGES)
        self.device = self.host.device
        if not poison:
            self.device.negotiate(self.device.features & ~mask(F_PAGE_POISON))
        self.poison = poison
        self.current: int | None = None  # the id that a hint may count for
        self.reporting = False  # the guest's last command was that id
        self.counted_pages = 0
        self.done = False
        self.target = 0
        self.refused_writes = 0
        self.issued: list[int] = []
        self.free_came = False

    # -- the host --------------------------------------------------------------------------------

    @precondition(lambda self: not self.device.hints.is_open)
    @rule()
    def the_host_asks(self):
        self.current = self.device.open_hints()
        self.reporting, self.counted_pages, self.done = False, 0, False
        assert self.current not in self.issued
        self.issued.append(self.current)

    @rule()
    def the_host_closes(self):
        self.device.close_hints()
        self.current, self.reporting = None, False

    @rule()
    def the_host_is_done(self):
        self.device.hints_done()
        self.current, self.reporting, self.done = None, False, True

    @rule(pages=st.integers(0, PAGES))
    def the_host_wants_pages(self, pages):
        self.device.set_num_pages(pages)
        self.target = pages

    def served(self):
        """What the host makes of the queue; the driver takes its buffers back."""
        events = self.host.hints()
        self.host.guest.used(QUEUE_HINT)
        return events

    # -- the guest -------------------------------------------------------------------------------

    @rule(word=WORDS | st.none())
    def a_command(self, word):
        """None: the newest id, whether or not it still counts."""
        command = word if word is not None else self.issued[-1] if self.issued else CMD_ID_FIRST
        self.host.guest.command(command)
        (event,) = self.served()
        self.free_came = True
        wanted = self.current is not None and command == self.current
        if wanted and self.device.hints.state is HintState.STARTED and isinstance(event, HintStarted):
            assert not self.reporting
            self.reporting = True
        elif self.reporting and not wanted:
            assert isinstance(event, HintStopped)
            self.current, self.reporting = None, False
        else:
            assert isinstance(event, StaleCommand | RejectedRange), event

    @rule(address=ADDRESSES, length=LENGTHS)
    def a_range(self, address, length):
        before = self.device.guest_errors.total()
        self.host.guest.rings[QUEUE_HINT].add([], [(address % 2**64, length)], None)
        self.host.guest.rings[QUEUE_HINT].publish()
        events = self.served()
        if not events:
            assert self.device.guest_errors.total() == before + 1, "outside RAM: the ring's error is counted"
            return
        self.free_came = True
        (event,) = events
        inside = address + length <= PAGES * PAGE_BYTES
        whole = (address + length) // PAGE_BYTES - -(-address // PAGE_BYTES)
        if not self.reporting:
            assert isinstance(event, StaleRange | RejectedRange), event
        elif isinstance(event, HintRange):
            assert inside
            assert event.page_count == whole
            self.counted_pages += whole
        else:
            assert isinstance(event, RejectedRange)
            assert whole <= 0 or not inside or self.counted_pages + whole > FLOOD_FACTOR * PAGES

    @rule(size=st.sampled_from([0, 1, 3, 5, 8, 64]))
    def a_command_of_no_length(self, size):
        if not size:
            return
        self.host.guest.command_bytes(bytes(size))
        (event,) = self.served()
        self.free_came = True
        assert isinstance(event, RejectedRange)

    @rule(offset=st.integers(0, 20), data=st.binary(max_size=12))
    def a_configuration_write(self, offset, data):
        before = self.device.guest_errors.total()
        poison = self.device.config.poison_val
        taken = self.device.write_config(offset, data)
        legal = len(data) == 4 and (offset == 4 or (offset == 12 and self.poison))
        assert taken <= legal
        assert self.device.guest_errors.total() == before + (not taken)
        if self.free_came:
            assert self.device.config.poison_val == poison, "pages may have been taken for what they were"

    @rule(offset=st.integers(-4, 300), size=st.integers(-1, 300))
    def a_configuration_read(self, offset, size):
        if offset < 0 or size < 0 or offset + size > CONFIG_BYTES:
            with pytest.raises(GuestProtocolError, match="config_range"):
                self.device.config.read(offset, size)
        else:
            assert len(self.device.config.read(offset, size)) == size

    # -- always ----------------------------------------------------------------------------------

    @invariant()
    def what_counts_is_what_the_model_says(self):
        if not hasattr(self, "host"):
            return
        hints = self.device.hints
        assert (hints.state is HintState.STARTED) == self.reporting
        assert self.counted_pages <= FLOOD_FACTOR * PAGES
        shown = BalloonConfig.from_bytes(self.device.read_config()).free_page_hint_cmd_id
        if self.done:
            assert shown == CMD_ID_DONE
        elif self.current is None:
            assert shown in (CMD_ID_STOP, CMD_ID_DONE, *self.issued[-1:])
        else:
            assert shown == self.current
        assert self.device.config.num_pages == self.target, "the target is the host's"
        assert set(self.device.guest_errors) <= COUNTED, self.device.guest_errors


HostileGuest.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_guest_makes_a_hint_count_that_was_not_asked_for = HostileGuest.TestCase
