"""Known bugs, planted one at a time, so that the simulator proves that it can fail.

Each is a mistake that somebody could make in a shell or a machine; what it breaks is found by the invariants,
not by
looking for it. `docs/simulator.md` says of each what loses.
"""

from __future__ import annotations

from enum import Enum

from testbed.errors import UsageError, did_you_mean


class Plant(Enum):
    """The value is the name on the command line."""

    NONE = ""
    DIRTY_LOG_CLEARED_AT_HINT = "dirty-log-cleared-at-hint"
    HARVEST_WHILE_ID_OPEN = "harvest-while-id-open"
    DIRTY_BIT_CLEARED_AFTER_READ = "dirty-bit-cleared-after-read"
    RESUME_AFTER_COMMITTING = "resume-after-committing"
    COMMIT_NOT_DURABLE = "commit-not-durable"
    DONE_FORGOTTEN_ON_CANCEL = "done-forgotten-on-cancel"
    RETRY_WITHOUT_ZEROING = "retry-without-zeroing"
    STALE_ID_ACCEPTED = "stale-id-accepted"
    ACKNOWLEDGED_FORGOTTEN_ON_RECONNECT = "acknowledged-forgotten-on-reconnect"
    PREPARE_REPLAYED_AFTER_RESUME = "prepare-replayed-after-resume"
    LATE_CHUNK_STORED = "late-chunk-stored"
    TWO_PROCESSES_ONE_JOURNAL = "two-processes-one-journal"
    DEVICE_STORES_NOT_LOGGED = "device-stores-not-logged"
    BALLOON_LOOKED_UP_TOO_EARLY = "balloon-looked-up-too-early"
    BALLOONED_THOUGH_WRITTEN = "ballooned-though-written"
    BALLOON_MASK_STALE = "balloon-mask-stale"
    BALLOON_DROPPED_AT_HANDOVER = "balloon-dropped-at-handover"
    BALLOON_NOT_GIVEN_BACK = "balloon-not-given-back"
    PUNCHED_PAGES_NOT_LOGGED = "punched-pages-not-logged"
    CHAIN_BACK_BEFORE_PUNCH = "chain-back-before-punch"


DESCRIPTIONS: dict[Plant, str] = {
    Plant.DIRTY_LOG_CLEARED_AT_HINT: "a hint clears the pages' dirty bits, and not the send set alone",
    Plant.HARVEST_WHILE_ID_OPEN: "one command id for all rounds: harvested while the guest still hints for it",
    Plant.DIRTY_BIT_CLEARED_AFTER_READ: "a page's dirty bit is cleared when it was read, not at the harvest",
    Plant.RESUME_AFTER_COMMITTING: "a source whose Commit is not answered lets its guest run on",
    Plant.COMMIT_NOT_DURABLE: "COMMITTED is written and not synced before the guest runs",
    Plant.DONE_FORGOTTEN_ON_CANCEL: "a cancelled or failed attempt does not tell the guest DONE",
    Plant.RETRY_WITHOUT_ZEROING: "a new attempt gets the memory of the last one as if it were zero",
    Plant.STALE_ID_ACCEPTED: "hints of an older command id count for the newest",
    Plant.ACKNOWLEDGED_FORGOTTEN_ON_RECONNECT: "after a reconnect chunks that were stored are sent again",
    Plant.PREPARE_REPLAYED_AFTER_RESUME: "a late PREPARED of an attempt that was turned back leads to its Commit",
    Plant.LATE_CHUNK_STORED: "a chunk of a stream that was joined is stored when it arrives",
    Plant.TWO_PROCESSES_ONE_JOURNAL: "a hung node and its replacement act on one journal",
    Plant.DEVICE_STORES_NOT_LOGGED: "the device's own stores into guest memory are in no dirty log",
    Plant.BALLOON_LOOKED_UP_TOO_EARLY: "round 1 leaves out what the balloon held before writes were tracked",
    Plant.BALLOONED_THOUGH_WRITTEN: "a page in the balloon is left out though the guest wrote it before it told",
    Plant.BALLOON_MASK_STALE: "what one harvest left out as ballooned the next one leaves out again",
    Plant.BALLOON_DROPPED_AT_HANDOVER: "the next host is not told which pages are in the balloon",
    Plant.BALLOON_NOT_GIVEN_BACK: "the next host keeps what it stored of pages that were ballooned afterwards",
    Plant.PUNCHED_PAGES_NOT_LOGGED: "pages that the device gave back to the host are in no dirty log",
    Plant.CHAIN_BACK_BEFORE_PUNCH: "inflated pages are answered at once and punched a moment later",
}


def plant_named(name: str) -> Plant:
    """Raises UsageError with the name that may have been meant."""
    known = {plant.value: plant for plant in DESCRIPTIONS}
    if name not in known:
        raise UsageError(
            f"there is no bug {name!r} to plant: `ballast sim --plant list` names them{did_you_mean(name, known)}"
        )
    return known[name]
