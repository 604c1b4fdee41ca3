"""What the balloon device says of itself: how things stand, and what travels with its guest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class CarriesDeviceState(Protocol):
    """What `adopt_state` reads: `DeviceState` here, or the protobuf message of that name."""

    @property
    def features(self) -> int:
        """Feature bits the driver accepted."""

    @property
    def num_pages(self) -> int:
        """Pages the host wants ballooned."""

    @property
    def actual(self) -> int:
        """Pages the driver says are."""

    @property
    def poison_value(self) -> int:
        """What the guest fills freed pages with."""

    @property
    def next_command_id(self) -> int:
        """The id to issue next."""

    @property
    def hints_open(self) -> bool:
        """Whether the guest waits for DONE."""

    @property
    def ballooned(self) -> bytes:
        """The pages in the balloon, see `host/ballooned.py`."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What travels with the guest (migration.proto). `hints_open`: the guest still waits for DONE."""

    features: int
    num_pages: int
    actual: int
    poison_value: int
    next_command_id: int
    hints_open: bool
    ring_bases: tuple[int, ...]
    ballooned: bytes = b""


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """How things stand.

    Attributes:
        ready: the driver is up, its rings run (with hints negotiated: that ring too), and it hears of
            configuration changes.
        hints_refusal: why free pages cannot be skipped by hints, in one line; "" when they can.
        hint_state: see `virtio.hint_session.HintState`.
        inflated_pages, deflated_pages, reported_pages: pages that crossed those queues since the node started.
        released_pages: of the inflated and reported ones, those whose storage left this host.
        guest_errors: how often the guest broke which rule.
        connection_errors: what front-ends lost their connection for.
        queue_numbering: "same", "fixed", "packed" or "undecided", see `virtio/queue_numbers.py`.
        memory_sealed: guest RAM is shared, and its file can shrink no more.
        stats: the guest's memory statistics by name, as of `stats_at_ns` (CLOCK_MONOTONIC; 0: none yet).
        stats_unknown_tags: entries of them whose tag has no name here.
    """

    ready: bool
    features: int
    num_pages: int
    actual: int
    hints_negotiated: bool
    hints_refusal: str
    poison_value: int
    hint_state: str
    inflated_pages: int
    deflated_pages: int
    reported_pages: int
    released_pages: int
    guest_errors: dict[str, int]
    connection_errors: dict[str, int]
    queue_numbering: str
    memory_sealed: bool
    stats: dict[str, int] = field(default_factory=dict)
    stats_at_ns: int = 0
    stats_unknown_tags: int = 0
