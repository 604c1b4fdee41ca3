"""The hint session as transcripts: what the guest sends (`sees`), what the session makes of it (`says`)."""

from __future__ import annotations

from typing import Self

import pytest

from virtio.balloon import CMD_ID_DONE, CMD_ID_FIRST, CMD_ID_STOP
from virtio.errors import LocalVirtioError
from virtio.hint_session import (
    HintEvent,
    HintRange,
    HintSession,
    HintStarted,
    HintState,
    HintStopped,
    RejectedRange,
    StaleCommand,
    StaleRange,
)

PAGES = 4096
ID = CMD_ID_FIRST


class Play:
    """A transcript in progress; every `sees` must be followed by `says`, and the last line is `finish`."""

    def __init__(self, session: HintSession) -> None:
        self.session = session
        self.heard: HintEvent | None = None
        self.lines: list[str] = []

    def opens(self, command_id: int) -> Self:
        assert self.session.open() == command_id, self.lines
        return self.shows(command_id)

    def closes(self) -> Self:
        self.session.close()
        return self

    def done(self) -> Self:
        self.session.done()
        return self

    def shows(self, command_id: int) -> Self:
        assert self.session.config_command_id == command_id, self.lines
        return self

    def sees_command(self, command_id: int) -> Self:
        return self._sees(f">> {command_id:#x}", self.session.feed_command(command_id.to_bytes(4, "little")))

    def sees_range(self, pfn: int, pages: int) -> Self:
        return self._sees(f">> {pfn}+{pages}", self.session.feed_range(pfn * 4096, pages * 4096, PAGES))

    def says(self, event: HintEvent) -> Self:
        self.lines.append(f"<< {self.heard}")
        assert self.heard == event, "\n".join([*self.lines, f"expected {event}"])
        self.heard = None
        return self

    def rejects(self) -> Self:
        assert isinstance(self.heard, RejectedRange), "\n".join(self.lines)
        self.heard = None
        return self

    def finish(self, state: HintState) -> None:
        assert self.heard is None, f"nobody looked at {self.heard}"
        assert self.session.state is state, "\n".join(self.lines)

    def _sees(self, line: str, heard: HintEvent) -> Self:
        assert self.heard is None, f"nobody looked at {self.heard}"
        self.lines.append(line)
        self.heard = heard
        return self


def play() -> Play:
    return Play(HintSession())


def test_a_whole_report():
    (
        play()
        .shows(CMD_ID_STOP)
        .opens(ID)
        .sees_command(ID).says(HintStarted(ID))
        .sees_range(64, 512).says(HintRange(64, 512))
        .sees_range(1024, 1024).says(HintRange(1024, 1024))
        .sees_command(CMD_ID_STOP).says(HintStopped(ID))
        .shows(ID)
        .closes().shows(CMD_ID_STOP)
        .done().shows(CMD_ID_DONE)
        .finish(HintState.DONE)
    )  # fmt: skip


def test_every_round_has_a_new_id_and_the_old_one_counts_no_more():
    (
        play()
        .opens(ID)
        .sees_command(ID).says(HintStarted(ID))
        .closes()
        .opens(ID + 1)
        .sees_range(8, 8).says(StaleRange(8))
        .sees_command(CMD_ID_STOP).says(StaleCommand(CMD_ID_STOP))
        .sees_command(ID + 1).says(HintStarted(ID + 1))
        .sees_range(8, 8).says(HintRange(8, 8))
        .sees_command(CMD_ID_STOP).says(HintStopped(ID + 1))
        .finish(HintState.STOPPED)
    )  # fmt: skip


def test_a_guest_that_starts_after_the_close_is_too_late():
    (
        play()
        .opens(ID)
        .closes()
        .sees_command(ID).says(StaleCommand(ID))
        .sees_range(8, 8).says(StaleRange(8))
        .sees_command(CMD_ID_STOP).says(StaleCommand(CMD_ID_STOP))
        .finish(HintState.STOPPED)
    )  # fmt: skip


def test_hints_without_a_request_mean_nothing():
    (
        play()
        .sees_command(2).says(StaleCommand(2))
        .sees_range(0, 8).says(StaleRange(8))
        .sees_command(CMD_ID_STOP).says(StaleCommand(CMD_ID_STOP))
        .finish(HintState.IDLE)
    )  # fmt: skip


def test_done_ends_a_report_that_runs():
    (
        play()
        .opens(ID)
        .sees_command(ID).says(HintStarted(ID))
        .done().shows(CMD_ID_DONE)
        .sees_range(8, 8).says(StaleRange(8))
        .sees_command(CMD_ID_STOP).says(StaleCommand(CMD_ID_STOP))
        .closes().shows(CMD_ID_DONE)
        .opens(ID + 1)
        .finish(HintState.REQUESTED)
    )  # fmt: skip


def test_bad_ranges_are_rejected_whatever_the_state():
    (
        play()
        .sees_range(PAGES, 1).rejects()
        .opens(ID)
        .sees_range(0, 0).rejects()
        .sees_command(ID).says(HintStarted(ID))
        .sees_range(PAGES - 1, 2).rejects()
        .sees_range(PAGES - 1, 1).says(HintRange(PAGES - 1, 1))
        .finish(HintState.STARTED)
    )  # fmt: skip


@pytest.mark.parametrize("started", [False, True])
def test_a_session_that_is_open_is_not_opened_again(started: bool):
    session = HintSession()
    command_id = session.open()
    if started:
        session.feed_command(command_id.to_bytes(4, "little"))
    with pytest.raises(LocalVirtioError):
        session.open()
