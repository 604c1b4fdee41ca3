"""The link between the two hosts: latency, bandwidth, and everything that a link can do wrong.

Rule 1: a call is a request and an answer, each of which may be late, doubled, overtaken or lost. A lost one
        shows as a
        deadline that is over; a host whose process is gone refuses at once.
Rule 2: a stream's messages come in order, as TCP's do, unless a fault is to show what the receiver does about it.
Rule 3: the two ends of a broken connection hear of it at different moments; what is on the way may still arrive.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from testbed.sim.plants import Plant
from testbed.sim.world import MS, Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.sim.options import Options
    from testbed.sim.world import World

RETRANSMIT_NS = 15 * MS  # what a short outage costs a message
STUCK, STUCK_NS = 0.4, 100 * MS
NOTICE_NS = 30 * MS  # a connection that broke is noticed within this
KEEPALIVE_NS = 150 * MS  # one that went silent, within this: shorter than the real one's ten seconds


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer: the connection broke, nobody listens, or the deadline is over. `came`: the question came there."""

    reason: str
    came: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """The destination's no, in one line."""

    reason: str


class Network:
    """Both directions, each by the name of the host that receives."""

    def __init__(self, world: World, options: Options) -> None:
        self.world = world
        self.cut: dict[str, int] = {"a": 0, "b": 0}  # how many faults hold this direction shut
        self.shares: dict[str, float] = {"lose": 0.0, "duplicate": 0.0, "delay": 0.0, "reorder": 0.0}
        self.pipes: list[Pipe] = []
        self.calls: list[_Call] = []
        self._options = options
        self.dice = world.dice("network")
        self._free_at_ns = 0

    def latency_ns(self) -> int:
        """Of one message."""
        return int(self._options.latency_ms * MS * self.dice.uniform(1 - self._options.jitter, 1.5))

    def happens(self, what: str) -> bool:
        """Whether this fault hits this message."""
        share = self.shares[what]
        if share and self.dice.random() < share:
            self.world.coverage[f"fault {what} a message"] += 1
            return True
        return False

    def noticed_ns(self) -> int:
        """After so long one end hears that a connection broke: often at once."""
        return self.dice.randrange(1, NOTICE_NS // 1000 if self.dice.random() < 0.4 else NOTICE_NS)

    def line_ns(self, size: int) -> int:
        """When so many bytes are through the link, from now on."""
        now = self.world.now_ns
        self._free_at_ns = max(self._free_at_ns, now) + int(size * 1e9 / self._options.bytes_per_second)
        return self._free_at_ns - now

    # -- calls ---------------------------------------------------------------------------------

    def call(
        self,
        caller: Process,
        between: tuple[str, str],
        server: Callable[[], Process | None],
        serve: Callable[[Process], Any],
        answered: Callable[[Any], None],
        *,
        timeout_ns: int,
    ) -> _Call:
        """Ask. `serve` runs in the server's process; `answered` gets what it gives, a Refusal, or Lost.

        `between` names the caller's host and the server's.
        """
        call = _Call(self, caller, between, answered)
        self.calls.append(call)
        self.world.after(timeout_ns, lambda: call.end(Lost("deadline exceeded", call.came)), caller)
        copies = 2 if self.happens("duplicate") else 1
        for copy in range(copies):
            if self.happens("lose"):
                continue
            delay_ns = self.latency_ns() + copy * self.dice.randrange(1, 80) * MS
            if self.happens("delay"):
                delay_ns += self.dice.randrange(1, 400) * MS
            if self.happens("reorder"):
                delay_ns += self.dice.randrange(1, 20) * MS
            self.world.after(delay_ns, lambda: self._arrive(call, server, serve))
        return call

    def _arrive(
        self, call: _Call, server: Callable[[], Process | None], serve: Callable[[Process], Any]
    ) -> None:
        if call.over:
            return
        if self.cut[call.between[1]]:
            self.world.after(RETRANSMIT_NS, lambda: self._arrive(call, server, serve))
            return
        process = server()
        if process is None or not process.alive:
            refused = Lost("connection refused", call.came)
            self.world.after(self.latency_ns(), lambda: call.end(refused), call.caller)
            return
        call.came = True

        def handle() -> None:
            answer = serve(process)
            if self.happens("lose"):
                return
            delay_ns = self.latency_ns()
            if self.happens("delay"):
                delay_ns += self.dice.randrange(1, 400) * MS
            self.world.after(delay_ns, lambda: self._return(call, answer), call.caller)

        self.world.now_in(process, handle)

    def _return(self, call: _Call, answer: Any) -> None:
        if self.cut[call.between[0]] and not call.over:
            self.world.after(RETRANSMIT_NS, lambda: self._return(call, answer), call.caller)
        else:
            call.end(answer)

    # -- connections ---------------------------------------------------------------------------

    def pipe(self, source: Process, between: tuple[str, str], accept: Callable[[Pipe], None]) -> Pipe:
        """A stream from the first host towards the second."""
        pipe = Pipe(self, source, between)
        self.pipes.append(pipe)
        until_ns = self.world.now_ns + KEEPALIVE_NS

        def connect() -> None:
            if not pipe.source_up:
                return
            if not self.cut[between[1]]:
                accept(pipe)
            elif self.world.now_ns < until_ns:
                self.world.after(RETRANSMIT_NS, connect)
            else:
                pipe.broken("the connection timed out")

        self.world.after(self.latency_ns(), connect)
        return pipe

    def reset(self, why: str = "connection reset") -> None:
        """Every connection breaks."""
        for pipe in tuple(self.pipes):
            pipe.broken(why)
        for call in tuple(self.calls):
            self.world.after(self.noticed_ns(), lambda call=call: call.end(Lost(why)), call.caller)  # type: ignore[misc]

    def process_ended(self, process: Process) -> None:
        """Its own calls are nobody's any more; those that it was to answer break."""
        for call in tuple(self.calls):
            if call.caller is process:
                call.forget()
            else:
                delay_ns = self.noticed_ns()
                self.world.after(delay_ns, lambda call=call: call.end(Lost("connection reset")), call.caller)  # type: ignore[misc]

    def shut(self, *directions: str) -> None:
        """Nothing gets through this way; connections that need it time out."""
        for direction in directions:
            self.cut[direction] += 1

        def look() -> None:
            if any(self.cut[direction] for direction in directions):
                self.reset("keepalive timed out")

        self.world.after(KEEPALIVE_NS, look)

    def open(self, *directions: str) -> None:
        """This fault is over."""
        for direction in directions:
            self.cut[direction] -= 1

    def heal(self) -> None:
        """No fault is left."""
        self.cut = dict.fromkeys(self.cut, 0)
        self.shares = dict.fromkeys(self.shares, 0.0)


class _Call:
    """One call, answered once."""

    def __init__(
        self, network: Network, caller: Process, between: tuple[str, str], answered: Callable[[Any], None]
    ) -> None:
        self.caller = caller
        self.between = between
        self.came = False  # to a process that serves
        self._network = network
        self._answered: Callable[[Any], None] | None = answered

    @property
    def over(self) -> bool:
        """Whether it has its answer, or nobody wants one."""
        return self._answered is None

    def end(self, answer: Any) -> None:
        """The first end counts."""
        answered, self._answered = self._answered, None
        if answered is not None:
            self._network.calls.remove(self)
            answered(answer)

    def forget(self) -> None:
        """Its channel was closed: nobody wants the answer any more."""
        if self._answered is not None:
            self._answered = None
            self._network.calls.remove(self)


class Pipe:
    """One page stream's connection. Its ends' callbacks are the source's lane's and the destination's shell's."""

    def __init__(self, network: Network, source: Process, between: tuple[str, str]) -> None:
        self.source = source
        self._here, self._there = between
        self.server: Process | None = None  # it was told of the call
        self.dest: Process | None = None  # it took the call
        self.at_dest: Callable[[bytes], None] | None = None
        self.at_source: Callable[[int], None] = lambda _: None
        self.dest_ended: Callable[[str], None] = lambda _: None  # "" is the source's half-close
        self.source_ended: Callable[[str, bool], None] = lambda _reason, _refused: None
        self.source_up = True
        self.dest_up = True
        self.is_broken = False
        self._network = network
        self._world = network.world
        self._waiting: deque[tuple[str, Any]] = deque()  # sent before the destination took the call
        self._held: deque[tuple[str, Any]] = deque()  # while the link is shut
        self._last_at_ns = 0

    # -- the source's end ----------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        """One chunk."""
        network = self._network
        if network.happens("lose"):
            self.broken("too many retransmissions")
            return
        copies = 2 if network.happens("duplicate") else 1
        for _ in range(copies):
            self._later("chunk", message, network.line_ns(len(message)), overtakes=network.happens("reorder"))

    def half_close(self) -> None:
        """No more chunks."""
        self._later("end", None, 0, overtakes=False)

    def cancel(self) -> None:
        """The source lets go of the call; the destination hears of it."""
        if self.source_up:
            self.source_up = False
            self._drop()
            self._later("cancel", None, 0, overtakes=False)

    def _later(self, what: str, message: Any, delay_ns: int, *, overtakes: bool) -> None:
        network = self._network
        if network.happens("delay"):
            delay_ns += network.dice.randrange(1, 60) * MS
        at_ns = self._world.now_ns + delay_ns + network.latency_ns()
        if not overtakes:
            at_ns = self._last_at_ns = max(at_ns, self._last_at_ns + 1)
        self._world.after(at_ns - self._world.now_ns, lambda: self._arrived(what, message))

    def _arrived(self, what: str, message: Any) -> None:
        """What was on the way when the connection broke may be stuck somewhere for a while."""
        if self.is_broken and self._network.dice.random() < STUCK:
            self._world.after(self._network.dice.randrange(1, STUCK_NS), lambda: self._deliver(what, message))
        else:
            self._deliver(what, message)

    def _deliver(self, what: str, message: Any) -> None:
        if self._network.cut[self._there]:
            self._held.append((what, message))
            if len(self._held) == 1:
                self._world.after(RETRANSMIT_NS, self._retransmit)
            return
        if self.dest is None:
            self._waiting.append((what, message))
            return
        self._world.now_in(self.dest, lambda: self._take(what, message))

    def _retransmit(self) -> None:
        if not self.dest_up and self._network.cut[self._there]:
            return
        held, self._held = self._held, deque()
        for what, message in held:
            self._deliver(what, message)

    def _take(self, what: str, message: Any) -> None:
        if what == "end":
            self._end_dest("")
        elif what == "cancel":
            self._end_dest("cancelled by the source")
        elif self.at_dest is not None and (self.dest_up or self._world.plant is Plant.LATE_CHUNK_STORED):
            self.at_dest(message)

    # -- the destination's end -----------------------------------------------------------------

    def accepted(self, process: Process) -> None:
        """The call was taken: what was sent before comes now."""
        self.dest = process
        waiting, self._waiting = self._waiting, deque()
        for what, message in waiting:
            self._deliver(what, message)

    def acknowledge(self, stored_below: int) -> None:
        """Cumulative."""

        def arrive() -> None:
            if self._network.cut[self._here] and self.source_up:
                self._world.after(RETRANSMIT_NS, arrive, self.source)
            elif self.source_up:
                self.at_source(stored_below)

        self._world.after(self._network.latency_ns(), arrive, self.source)

    def close(self, reason: str = "", *, refused: bool = False) -> None:
        """The destination ends the call: in order (""), or with a reason."""
        self.dest_up = False

        def arrive() -> None:
            if self._network.cut[self._here] and self.source_up:
                self._world.after(RETRANSMIT_NS, arrive, self.source)
            else:
                self._end_source(reason, refused)

        self._world.after(self._network.latency_ns(), arrive, self.source)

    # -- both ----------------------------------------------------------------------------------

    def broken(self, reason: str) -> None:
        """The connection is gone: each end notices in its own time."""
        self.is_broken = True
        self._drop()
        noticed = self._network.noticed_ns
        self._world.after(noticed(), lambda: self._end_source(reason, False), self.source)
        self._world.after(noticed(), lambda: self._end_dest(reason))

    def _drop(self) -> None:
        if self in self._network.pipes:
            self._network.pipes.remove(self)

    def _end_source(self, reason: str, refused: bool) -> None:
        if self.source_up:
            self.source_up = False
            self._drop()
            self.source_ended(reason, refused)

    def _end_dest(self, reason: str) -> None:
        if self.dest_up:
            self.dest_up = False
            if self.dest is not None and self.dest.alive:
                self._world.now_in(self.dest, lambda: self.dest_ended(reason))
