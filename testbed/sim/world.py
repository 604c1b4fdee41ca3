"""One simulated world: virtual time, processes that die and hang, and everything that has to be asked of it.

Rule 1: whatever happens is an event at an instant; events of one instant come in the order they were asked for. The
        same seed and the same schedule give the same world, step by step.
Rule 2: an event may belong to a process: of a dead one it does not happen, of a hung one it waits.
Rule 3: a process may die at any named point of what it is doing (`reach`): the rest of that event never happens.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from testbed.sim.draw import stream
from testbed.sim.errors import ProcessDied, ViolationError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from testbed.sim.plants import Plant

MS = 1_000_000
EVENTS_WAITING_MAX = 4096  # far more than any world of ours needs: whoever reaches it leaks


class Process:
    """Something that can die and hang. `name` is for transcripts."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.hung = False
        self.backlog: list[Callable[[], None]] = []

    def die(self) -> None:
        """It is gone, with everything it was about to do."""
        self.alive = False
        self.backlog.clear()

    def wake(self) -> None:
        """It goes on where it hung, with everything that came meanwhile."""
        self.hung = False
        backlog, self.backlog = self.backlog, []
        for action in backlog:
            self.world.after(0, action, self)


class World:
    """Time, dice, coverage and transcript of one seed."""

    def __init__(self, seed: int, plant: Plant, *, transcript: bool = False) -> None:
        self.seed = seed
        self.plant = plant
        self.now_ns = 0
        self.steps = 0
        self.hold_ns = 0  # at a point: as long as the fault that came there lasts
        self.coverage: Counter[str] = Counter()
        self.transcript: list[str] | None = [] if transcript else None
        self.guest_pause_ns: Callable[[], int] = lambda: MS
        self.at_point: dict[str, list[Callable[[], bool]]] = {}  # -> whether a fault came
        self._heap: list[tuple[int, int, Process | None, Callable[[], None]]] = []
        self._order = 0
        self._current: Process | None = None

    def dice(self, name: str) -> random.Random:
        """The dice of one part."""
        return stream(self.seed, name)

    def after(self, delay_ns: int, action: Callable[[], None], owner: Process | None = None) -> None:
        """Have something happen later."""
        self._order += 1
        heapq.heappush(self._heap, (self.now_ns + delay_ns, self._order, owner, action))
        if len(self._heap) > EVENTS_WAITING_MAX:
            raise ViolationError("bounded", f"{len(self._heap)} events wait to happen")

    def now_in(self, process: Process, action: Callable[[], None]) -> None:
        """Something reaches a process at this moment: it acts, unless it is dead; one that hangs finds it later."""
        if process.hung:
            process.backlog.append(action)
        elif process.alive:
            before, self._current = self._current, process
            action()
            self._current = before

    def run_until(self, instant_ns: int, stop: Callable[[], bool]) -> None:
        """Let things happen until then, or until `stop` says so."""
        heap = self._heap
        while heap and heap[0][0] <= instant_ns:
            self.now_ns, _, owner, action = heapq.heappop(heap)
            if owner is not None and not owner.alive:
                continue
            if owner is not None and owner.hung:
                owner.backlog.append(action)
                continue
            self.steps += 1
            self._current = owner
            try:
                action()
            except ProcessDied:
                self.say("world", "… in the middle of it")
            self._current = None
            if stop():
                return
        self.now_ns = max(self.now_ns, instant_ns)

    def reach(self, point: str) -> bool:
        """The process at work is at this point; a fault may be waiting for it here: whether one was."""
        self.coverage[f"point {point}"] += 1
        waiting = self.at_point.get(point)
        if waiting:
            acting = self._current
            came = waiting.pop(0)()
            if acting is not None and not acting.alive:
                raise ProcessDied
            return came
        return False

    def count(self, what: str, came: object) -> None:
        """Something that worlds should reach, if it came."""
        if came:
            self.coverage[what] += 1

    def say(self, who: str, what: str) -> None:
        """One line of the transcript."""
        if self.transcript is not None:
            self.transcript.append(f"{self.now_ns / 1e6:10.3f} ms  {who:<10} {what}")
