"""Sessions that stand: hosts that `ballast up` started and that later commands find again.

Rule 1: a session is kept by one process (keeper.py) that owns its hosts as a run does; commands speak to it over a
        unix socket in the run's runtime directory, which only its user can enter. What dies with the keeper is what
        a crashed run leaves, and `ballast clean` removes it.
Rule 2: a session lives as long as somebody holds the lock of its runtime directory; its file there says the rest.
Rule 3: without `--session` a command means the newest live session.
Rule 4: a request is one line of JSON, and so is everything that comes back: events as they happen, then one answer.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from testbed.errors import MachineCannotError, RecordError, RunBrokenError, TestbedError, UsageError
from testbed.history import Event
from testbed.hosts import runtime_dir
from testbed.record.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from testbed.scenario.document import Scenario

SESSION_FILE: Final = "session.json"
SOCKET_NAME: Final = "keeper"
CONNECT_S: Final = 5.0  # the keeper of a standing session accepts at once
# Which error a refusal is, by its exit code.
ERRORS: Final[Mapping[int, type[TestbedError]]] = {1: RunBrokenError, 2: UsageError, 3: MachineCannotError}


@dataclass(frozen=True, slots=True)
class StandingSession:
    """A session as its file tells; `runtime` is where its keeper listens."""

    run: str
    scenario: str
    started_ns: int
    keeper_pid: int
    run_dir: Path
    runtime: Path

    @property
    def alive(self) -> bool:
        """Whether its keeper still holds it."""
        return self.runtime.is_dir() and not runtime_dir.is_dead(self.runtime)

    def write(self) -> None:
        """Makes it known; atomic."""
        document = {**asdict(self), "run_dir": str(self.run_dir), "runtime": str(self.runtime)}
        write_json(self.runtime / SESSION_FILE, document)


def remembered() -> list[StandingSession]:
    """All that this user has, live or dead, the newest first."""
    found = [session for path in runtime_dir.found() if (session := _read(path)) is not None]
    return sorted(found, key=lambda session: session.started_ns, reverse=True)


def choose(wanted: Path | None) -> StandingSession:
    """The session that a command means. Raises UsageError with what to do when there is none."""
    known = remembered()
    if wanted is None:
        live = [session for session in known if session.alive]
        if live:
            return live[0]
        dead = f"; {_death(known[0])}" if known else ""
        raise UsageError(f"no session stands: `ballast up SCENARIO.toml` starts one{dead}")
    place = wanted.resolve()
    for session in known:
        if place in (session.run_dir.resolve(), session.runtime.resolve()):
            if session.alive:
                return session
            raise UsageError(_death(session))
    if (place / "verdict.json").exists():
        raise UsageError(
            f"{wanted}: this session has ended; `ballast check {wanted}` judges its record again"
        )
    others = ", ".join(str(session.run_dir) for session in known if session.alive) or "none"
    raise UsageError(f"{wanted}: is no standing session's run directory (live: {others})")


class KeeperGoneError(RunBrokenError):
    """The keeper ended before it had answered."""


class Conversation:
    """One request and its answer."""

    def __init__(self, session: StandingSession) -> None:
        self._session = session
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._hung_up = False

    def ask(
        self, request: Mapping[str, Any], watch: Callable[[Event], None] = lambda _: None
    ) -> dict[str, Any]:
        """What the keeper answers; `watch` is told the events on the way.

        Raises:
            TestbedError: as the keeper refused.
            RunBrokenError: it went away, or `hang_up` was called.
        """
        place = self._session.run_dir
        try:
            with self._connection as connection:
                connection.settimeout(CONNECT_S)
                connection.connect(str(self._session.runtime / SOCKET_NAME))
                connection.settimeout(None)  # a migration takes as long as it takes; Ctrl-C ends it
                connection.sendall(json.dumps(request).encode() + b"\n")
                with connection.makefile("r", encoding="utf-8") as lines:
                    return read_answer(lines, watch)
        except OSError as error:
            raise RunBrokenError(f"the session {place} does not answer: {error.strerror}") from error
        except KeeperGoneError:
            if self._hung_up:
                raise RunBrokenError("not waited for; `ballast status` shows what came of it") from None
            raise

    def hang_up(self) -> None:
        """Waits no more; what was asked for goes on. From any thread."""
        self._hung_up = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def ask(session: StandingSession, request: Mapping[str, Any]) -> dict[str, Any]:
    """What the keeper answers to a short request. Raises as Conversation.ask."""
    return Conversation(session).ask(request)


def read_answer(lines: IO[str], watch: Callable[[Event], None]) -> dict[str, Any]:
    """Events until the answer. Raises as `ask`."""
    for line in lines:
        document = json.loads(line)
        if "event" in document:
            told = document["event"]
            watch(Event(told["at_ns"], told["origin"], told["name"], told["fields"]))
        elif "problems" in document:
            raise ERRORS.get(document["exit_code"], RunBrokenError)(*document["problems"])
        else:
            answer: dict[str, Any] = document["answer"]
            return answer
    raise KeeperGoneError(
        "the session's keeper ended; `ballast clean` removes what it left, its log says why"
    )


class Beginning:
    """A keeper that is being started: its own session and process group, so that no Ctrl-C here reaches it."""

    def __init__(self, scenario: Scenario, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        order = {"scenario": scenario.model_dump(mode="json"), "out": str(out.resolve())}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testbed.standing.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._told = self._process.stdout
        self._process.stdin.write(json.dumps(order))
        self._process.stdin.close()

    def wait(self, watch: Callable[[Event], None]) -> StandingSession:
        """The session, once it stands. Raises as `ask`: then nothing of it is left."""
        try:
            answer = read_answer(self._told, watch)
        except TestbedError:
            self._process.wait()  # ends: its keeper failed and says so last
            raise
        finally:
            self._told.close()
        return choose(Path(answer["session"]))

    def interrupt(self) -> None:
        """It takes down what it has started, and says so."""
        self._process.terminate()


def of_run(run: str) -> Path:
    """The runtime directory of a run of this user."""
    return runtime_dir.base() / f"{runtime_dir.PREFIX}{run}"


def manifest_of(run_dir: RunDir) -> dict[str, Any]:
    """What was asked for. Raises RecordError."""
    try:
        manifest: dict[str, Any] = json.loads(run_dir.manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{run_dir.manifest}: {error}") from error
    return manifest


def _death(session: StandingSession) -> str:
    return f"the session {session.run_dir} has died: `ballast clean` removes what it left behind"


def _read(path: Path) -> StandingSession | None:
    try:
        told = json.loads((path / SESSION_FILE).read_text(encoding="utf-8"))
        return StandingSession(**{**told, "run_dir": Path(told["run_dir"]), "runtime": path})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a run that is no session, or one that is just going
