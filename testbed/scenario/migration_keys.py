"""The scenario's `[migration]`: how the guest is migrated, its limits, and what happens where they end.

Rule 1: the defaults are those of an operator who stated nothing: nothing slows the guest, a stall alone decides
        nothing (`on_stall = "none"`: the stated limits do), and what is out of time is cancelled.
Rule 2: a key that means nothing beside another one is an error, with the way out in its message.
Rule 3: one function turns the section into the node's request; 0 stands for "not limited" and "off" there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator, Field

from migration.partition import STREAMS_MAX
from migration.pb import node_pb2
from testbed.documents import Model
from testbed.units import parse_bytes, parse_duration_ms, parse_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerSecond = Annotated[int, BeforeValidator(parse_rate)]
DurationMs = Annotated[int, BeforeValidator(parse_duration_ms)]
Percent = Annotated[int, Field(ge=1, le=99)]  # a guest is slowed, never stopped: as in auto-converge

ROUNDS_MAX: Final = 1000  # a limit on everything: beyond it the dirty rate exceeds the link
LINK_TIMEOUT_MS: Final = 10_000  # a port that restarts, a route that changes; the guest runs meanwhile
RETRIES_MAX: Final = 100  # each is a whole attempt: a slip must not last a day


class Throttle(Model):
    """Steps of auto-converge, in percent of the vCPU's time that it must sleep."""

    start: Percent = 20
    increment: Percent = 10
    maximum: Percent


class Migration(Model):
    """How the guest is migrated."""

    skip: Literal["none", "zero", "hint", "both"] = "both"
    tracker: Literal["auto", "uffd", "hash"] = "auto"
    integrity: Literal["full", "stream"] = "full"
    rounds_max: Annotated[int, Field(ge=1, le=ROUNDS_MAX)] = 30
    bandwidth: BytesPerSecond = 0
    downtime_limit: DurationMs = 300
    hint_wait: DurationMs = 100
    timeout: DurationMs = 60_000
    on_rounds_max: Literal["switch", "cancel"] = "switch"
    on_timeout: Literal["cancel", "switch"] = "cancel"
    on_stall: Literal["none", "switch", "throttle", "cancel"] = "none"
    throttle: Throttle | None = None
    streams: Annotated[int, Field(ge=0, le=STREAMS_MAX)] = 0  # 0: chosen from the cores
    compression: Literal["none", "lz4", "zstd"] = "none"
    delta_cache: Bytes = 0  # of pages as the destination acknowledged them; 0: no deltas
    link_timeout: DurationMs = LINK_TIMEOUT_MS  # within it a lost connection may come back; 0: it may not
    link_timeout_paused: DurationMs = 1000  # and within this, where it is less, while the guest stands still
    retries: Annotated[int, Field(ge=0, le=RETRIES_MAX)] = 0  # after a lost link or destination
    retry_pause: DurationMs = 1000  # before the first of them; it doubles (testbed/run/attempts.py)
    rehearsal: bool = False  # everything but the hand-over: the guest goes on at the source
    # LOSES WRITES. The source clears the dirty log of hinted pages when it processes the hint, as has been done
    # elsewhere: it shows that the checkers catch it. Only with expect = "corruption".
    unsafe_clear_dirty_log_at_hint: bool = False

    @property
    def hints(self) -> bool:
        """Whether hinted pages are skipped."""
        return self.skip in ("hint", "both")


# What `migration_conflicts` and the checks across sections look at.
CHECKED_KEYS: Final = (
    "skip", "tracker", "rehearsal", "unsafe_clear_dirty_log_at_hint",
    "timeout", "on_timeout", "on_stall", "throttle", "link_timeout",
)  # fmt: skip


def migration_conflicts(migration: Migration, expect: object) -> Iterator[tuple[str, str]]:
    """What is wrong among the keys of the section, as (path, problem)."""
    if migration.unsafe_clear_dirty_log_at_hint:
        yield from _unsafe_conflicts(migration, expect)
    yield from limit_conflicts(migration)


def limit_conflicts(migration: Migration, path: str = "migration") -> Iterator[tuple[str, str]]:
    """What is wrong among the limits of a migration or a leg, as (path, problem)."""
    if migration.on_timeout == "switch" and not migration.timeout:
        yield f"{path}.on_timeout", f"'switch' means nothing without a timeout: give {path}.timeout"
    throttle = migration.throttle
    if migration.on_stall == "throttle" and throttle is None:
        problem = f"is missing: on_stall = 'throttle' needs at least {path}.throttle.maximum, in percent"
        yield f"{path}.throttle", problem
    if throttle is not None and migration.on_stall != "throttle":
        problem = f"means nothing with on_stall = '{migration.on_stall}': set on_stall = 'throttle'"
        yield f"{path}.throttle", problem
    if throttle is not None and throttle.start > throttle.maximum:
        problem = f"{throttle.start} % is above the maximum of {throttle.maximum} %"
        yield f"{path}.throttle.start", problem
    if migration.timeout and migration.link_timeout > max(migration.timeout, LINK_TIMEOUT_MS):
        problem = f"{migration.link_timeout} ms outlast {path}.timeout = {migration.timeout} ms"
        yield f"{path}.link_timeout", problem


def _unsafe_conflicts(migration: Migration, expect: object) -> Iterator[tuple[str, str]]:
    path = "migration.unsafe_clear_dirty_log_at_hint"
    if expect != "corruption":
        yield path, f"loses the guest's writes: it needs expect = 'corruption', not '{expect}'"
    if not migration.hints:
        yield path, f"means nothing with skip = '{migration.skip}'"


def migrate_request(
    options: Migration,
    *,
    migration: str,
    attempt: int,
    dest_address: str,
    dest_server_name: str = "",
    rehearsal: bool,
) -> node_pb2.MigrateRequest:
    """The request to the source's node; `rehearsal` because a guest's kind may demand it, too.

    `dest_server_name` is the destination's certificate's; "" is plain text.
    """
    throttle = options.throttle
    return node_pb2.MigrateRequest(
        migration=migration,
        attempt=attempt,
        dest_address=dest_address,
        dest_server_name=dest_server_name,
        skip=options.skip,
        tracker=options.tracker,
        integrity=options.integrity,
        rounds_max=options.rounds_max,
        bandwidth_bytes_per_second=options.bandwidth,
        downtime_limit_ms=options.downtime_limit,
        hint_wait_ms=options.hint_wait,
        timeout_ms=options.timeout,
        on_rounds_max=options.on_rounds_max,
        on_timeout=options.on_timeout,
        on_stall=options.on_stall,
        throttle_start_percent=throttle.start if throttle else 0,
        throttle_increment_percent=throttle.increment if throttle else 0,
        throttle_maximum_percent=throttle.maximum if throttle else 0,
        streams=options.streams,
        compression=options.compression,
        delta_cache_bytes=options.delta_cache,
        link_timeout_ms=options.link_timeout,
        link_timeout_paused_ms=options.link_timeout_paused,
        unsafe_clear_dirty_log_at_hint=options.unsafe_clear_dirty_log_at_hint,
        rehearsal=rehearsal,
    )
