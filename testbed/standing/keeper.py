"""`python -m testbed.standing.keeper`: the process that keeps a session standing, and does what commands ask of it.

Rule 1: it is a run whose steps come from outside: the same hosts, history, witness and judgement; its end is a
        run's end, and everything it started ends with it.
Rule 2: one migration at a time; status and faults are answered beside it. Every request is answered once, and an
        error is an answer.
        Nobody who watches, or has stopped watching, holds anything up.
Rule 3: the session ends by `down` (the guest is checked, the record judged) or by a signal (neither).
Rule 4: legs are written into the manifest as they are made, so that the record can be judged at any time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from testbed.checkers import judge
from testbed.clock import now_ns
from testbed.errors import InterruptedRunError, RunBrokenError, TestbedError, UsageError
from testbed.interrupt import Interrupt
from testbed.record.run_dir import write_json
from testbed.record.run_record import load
from testbed.run.runner import conclude, record_run
from testbed.scenario.document import Scenario
from testbed.scenario.leg_keys import Leg
from testbed.standing.by_hand import ByHand
from testbed.standing.sessions import SOCKET_NAME, StandingSession, manifest_of, of_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.history import Event
    from testbed.run.session import Session

BACKLOG: Final = 16
WAITING_LINES_MAX: Final = 16_384  # a quarter of an hour of progress, some MiB: a viewer that is stopped
LAST_WORDS_S: Final = 5.0  # for an answer to be read before we go on or end; nobody who listens needs it
REQUEST_BYTES_MAX: Final = 1 << 20  # an order of some hundred bytes; more is not one of ours
FIRST_LEG: Final = "b"


class Voice:
    """One command's ear: lines of JSON, as long as it listens.

    Whoever speaks is never held up: lines wait for a thread of the voice's own. A listener who was stopped (Ctrl-Z)
    finds them when he goes on; one who lets WAITING_LINES_MAX of them wait is told nothing more.
    """

    def __init__(self, write: Callable[[bytes], object], finish: Callable[[], object] = lambda: None) -> None:
        """`write` may block; `finish` is called once, after the last line or when nobody listens any more."""
        self._write, self._finish = write, finish
        self._lines: deque[bytes] = deque()  # bounded: WAITING_LINES_MAX, then nothing is added
        self._changed = threading.Condition()
        self._over = False
        self._writer = threading.Thread(target=self._write_all, name="voice", daemon=True)
        self._writer.start()

    def event(self, event: Event) -> None:
        """What happens meanwhile."""
        self._say({"event": event.to_dict()})

    def answer(self, document: dict[str, Any]) -> None:
        """The end of a request that went well."""
        self._say({"answer": document})

    def refuse(self, error: TestbedError) -> None:
        """The end of one that did not."""
        self._say({"problems": list(error.problems), "exit_code": error.exit_code})

    def _say(self, document: dict[str, Any]) -> None:
        line = json.dumps(document, ensure_ascii=False).encode() + b"\n"
        with self._changed:
            if not self._over:
                self._lines.append(line)
                self._over = len(self._lines) >= WAITING_LINES_MAX
                self._changed.notify()

    def close(self, wait_s: float = 0.0) -> None:
        """Nothing more will be said. Waits at most so long until what was said is written."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._writer.join(wait_s)

    def _write_all(self) -> None:
        try:
            while (line := self._next_line()) is not None:
                self._write(line)
        except OSError:  # it went away: Ctrl-C, a closed terminal; what it asked for goes on
            self._over = True
        self._finish()

    def _next_line(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._over)  # ends: `close`
            return self._lines.popleft() if self._lines else None


class Keeper:
    """Serves one session from the moment at which its guest has settled."""

    def __init__(self, voice: Voice, interrupt: Interrupt) -> None:
        self._up = voice
        self._interrupt = interrupt
        self._ended = threading.Event()
        self._busy = threading.Lock()
        self._voices: list[Voice] = [voice]  # of `up`, then of whoever watches a migration
        self._down: Voice | None = None
        self.legs_made = 0

    def watch(self, event: Event) -> None:
        """Tells everybody who listens."""
        for voice in tuple(self._voices):
            voice.event(event)

    def keep(self, session: Session) -> None:
        """Between the start of the hosts and their end."""
        session.settle()
        run_dir = session.run_dir
        run = str(manifest_of(run_dir)["run"])
        standing = StandingSession(
            run, run_dir.path.parent.name, now_ns(), os.getpid(), run_dir.path, of_run(run)
        )
        hands = ByHand(session, self._interrupt)
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(standing.runtime / SOCKET_NAME))
            listener.listen(BACKLOG)
            stack.callback(hands.heal_all)
            standing.write()
            serving = threading.Thread(
                target=self._serve, args=(listener, hands), name="requests", daemon=True
            )
            serving.start()
            session.history.note("session_stands", keeper_pid=os.getpid())
            self._voices.remove(self._up)
            self._up.answer({"session": str(run_dir.path)})
            self._up.close(LAST_WORDS_S)
            _leave_the_terminal(run_dir.logs / "keeper.log")
            self._interrupt.listen(self._ended.set)
            stack.callback(self._interrupt.ignore, self._ended.set)
            if not self._interrupt.pressed:
                self._ended.wait()  # ends: `ballast down`, or Ctrl-C
            self.legs_made = hands.legs_made
            if self._down is None:
                raise InterruptedRunError("the session's keeper was told to end")

    def conclude(self, finished: Callable[[], dict[str, Any]]) -> None:
        """Judges, and answers whoever asked for the end."""
        if self._down is None:
            return
        try:
            self._down.answer(finished())
        except TestbedError as error:
            self._down.refuse(error)
        self._down.close(LAST_WORDS_S)

    def failed(self, error: TestbedError) -> None:
        """The session did not come to stand."""
        self._up.refuse(error)
        self._up.close(LAST_WORDS_S)

    def _serve(self, listener: socket.socket, hands: ByHand) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the session ends
                return
            threading.Thread(target=self._hear, args=(connection, hands), name="request", daemon=True).start()

    def _hear(self, connection: socket.socket, hands: ByHand) -> None:
        with connection.makefile("rb") as asked:
            line = asked.readline(REQUEST_BYTES_MAX)
        voice = Voice(connection.sendall, connection.close)
        try:
            request = json.loads(line)
            answer = self._carry_out(str(request["command"]), request, voice, hands)
            if answer is None:
                return  # answered at the end of the session, by `conclude`
            voice.answer(answer)
        except TestbedError as error:
            voice.refuse(error)
        except (ValueError, KeyError, TypeError) as error:
            voice.refuse(UsageError(f"the request is not understood: {type(error).__name__}: {error}"))
        voice.close()

    def _carry_out(  # noqa: PLR0911 - one answer a command
        self, command: str, request: dict[str, Any], voice: Voice, hands: ByHand
    ) -> dict[str, Any] | None:
        match command:
            case "status":
                return hands.status()
            case "migrate":
                with _only_one(
                    self._busy, "a migration is under way: wait for it, or cancel it with Ctrl-C there"
                ):
                    self._voices.append(voice)
                    try:
                        return hands.migrate(request["to"], request["overrides"], request["expect"])
                    finally:
                        self._voices.remove(voice)
            case "dirty_rate":
                with _only_one(self._busy, "a migration is under way: it reads the dirty log"):
                    return hands.measure_dirty_rate(request["period_ms"], request["periods"])
            case "cancel":
                return hands.cancel()
            case "resolve":
                return hands.resolve(request["dead"], request["fenced"])
            case "fault_add":
                return hands.add_fault(request["kind"], request["parameters"])
            case "fault_heal":
                return hands.heal_fault(request["id"])
            case "down":
                with _only_one(self._busy, "a migration is under way: wait for it, or cancel it first"):
                    if self._ended.is_set():
                        raise UsageError("the session is being taken down already")
                    self._voices.append(voice)
                    hands.heal_all()
                    hands.last_look()
                    self._down = voice
                    self._ended.set()
                    return None
            case _:
                raise UsageError(f"there is no command {command!r}")


class _only_one:  # noqa: N801 - a context manager that reads as a clause
    """Holds the lock, or refuses at once."""

    def __init__(self, lock: threading.Lock, otherwise: str) -> None:
        self._lock, self._otherwise = lock, otherwise

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UsageError(self._otherwise)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def _leave_the_terminal(log: Path) -> None:
    """Whoever started us may go: nothing of ours holds his terminal or pipe."""
    sys.stdout.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(file.fileno(), sys.stdout.fileno())


def _finished(run_dir: Any, keeper: Keeper) -> dict[str, Any]:
    if not keeper.legs_made:  # there is no migration to report, and a guest that was asked all the same
        judgement = judge(load(run_dir.path))
        write_json(run_dir.verdict, judgement.to_dict())
        return {"session": str(run_dir.path), "legs": 0, "exit_code": judgement.exit_code, "result": None}
    run = conclude(run_dir)
    return {
        "session": str(run_dir.path), "legs": keeper.legs_made, "exit_code": run.exit_code,
        "result": run.result.to_dict(),
    }  # fmt: skip


def main() -> int:
    """Keeps the session that standard input describes; tells standard output until it stands."""
    order = json.load(sys.stdin)
    scenario = Scenario.model_validate(order["scenario"])
    if not scenario.leg:
        leg = Leg.model_validate({**scenario.migration.model_dump(), "to": FIRST_LEG})
        scenario = scenario.model_copy(update={"leg": (leg,)})
    out = os.dup(sys.stdout.fileno())  # the voice's own: it may still be written when the session has left it

    def write(line: bytes) -> None:
        while line:
            line = line[os.write(out, line) :]

    with Interrupt() as interrupt:
        keeper = Keeper(Voice(write, lambda: os.close(out)), interrupt)
        try:
            run_dir, broken = record_run(scenario, Path(order["out"]), interrupt, keeper.watch, keeper.keep)
        except TestbedError as error:
            keeper.failed(error)
            return error.exit_code
        if broken is not None:
            keeper.failed(
                broken if isinstance(broken, RunBrokenError) else InterruptedRunError(*broken.problems)
            )
            return broken.exit_code
        keeper.conclude(lambda: _finished(run_dir, keeper))
    return 0


if __name__ == "__main__":
    sys.exit(main())
