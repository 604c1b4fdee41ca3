"""The guest that lives on this host: the agent that holds it, and its RAM as the agent passed it.

Rule 1: the agent is the authority on the guest's state; this class asks, and remembers only descriptors.
Rule 2: RAM belongs to one guest. It is taken from the agent once it has one, and dropped when it is let go of:
        given away, its evidence collected.
Rule 3: an agent whose connection broke is looked for again, for as long as the node lives. While a migration
        listens for the loss, its end is awaited first: it has to find out for itself what became of its guest.
        What the journal says of the guest is carried out once for each agent process.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import psutil

from host.errors import AgentLost, HostError
from host.guest_memory import HostRam
from host.pagemap import WriteScanner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from host.agent_link import AgentLink, Hello
    from host.event_log import EventLog

ATTACH_POLL_S = 1.0  # one wait for the agent's socket; then look whether the node is stopping


class LocalGuest:
    """Thread-safe. `link` is usable after `attached`."""

    def __init__(self, link: AgentLink, events: EventLog) -> None:
        self.link = link
        self.ram: HostRam | None = None
        self.scanner: WriteScanner | None = None
        self.write_protect_reason = "the guest agent has not passed its memory yet"
        self._events = events
        self._attached = threading.Event()
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name="attach-guest", daemon=True)
        self._wanted = threading.Event()  # somebody has to look for the agent
        self._wanted.set()
        self._unwatched = threading.Event()
        self._unwatched.set()
        self._on_attached: Callable[[], None] = lambda: None
        self._pid = 0
        self._lost_listener: Callable[[str], None] | None = None
        link.on_notify = self._notified
        link.on_lost = self._lost

    @property
    def attached(self) -> bool:
        """Whether the agent was found."""
        return self._attached.is_set()

    @property
    def ready(self) -> bool:
        """Whether the guest has finished booting and setting its workloads up."""
        return self._ready.is_set()

    def start(self, on_attached: Callable[[], None]) -> None:
        """Look for the agent in the background; `on_attached` runs once for every process of it that is found.

        For the first one before anybody else may use it.
        """
        self._on_attached = on_attached
        self._thread.start()

    def stop(self) -> None:
        """Let go of the agent and of its RAM. The guest lives on."""
        self._stopping.set()
        self._wanted.set()
        self._unwatched.set()
        self.link.close()  # first: it ends the wait for an agent that never came
        self._thread.join()  # ends: within ATTACH_POLL_S
        self.drop_ram()

    def hello(self) -> Hello:
        """The agent's own account of the guest. Raises AgentLost."""
        return self.link.hello()

    def found_again(self) -> bool:
        """Connect anew to an agent whose connection broke; False when its process is gone.

        Silence proves nothing: an agent that is slow or stopped may go on. Not for the link's own thread.
        """
        while not self.process_gone:
            try:
                self.link.connect(timeout=ATTACH_POLL_S)
            except AgentLost:
                if self._stopping.is_set():
                    return False
                continue
            return True
        return False

    @property
    def process_gone(self) -> bool:
        """Whether the agent's process has ended (a zombie has)."""
        try:
            return psutil.Process(self._pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def listen_for_loss(self, listener: Callable[[str], None] | None) -> None:
        """Have one listener told, on whatever thread finds it out, when the agent's connection breaks."""
        self._lost_listener = listener
        if listener is None:
            self._unwatched.set()
        else:
            self._unwatched.clear()

    def take_ram(self) -> HostRam:
        """Receive the running guest's RAM and dirty tracking from the agent (again).

        Raises:
            AgentError, AgentLost.
        """
        info = self.link.ram()
        with self._lock:
            self._drop()
            try:
                self.ram = HostRam(info.memfd, info.memory_bytes)
            except BaseException:
                info.close()
                raise
            self.write_protect_reason = info.write_protect_reason
            if info.pagemap_fd is not None:
                self.scanner = WriteScanner(info.pagemap_fd, info.base_address, self.ram.pages)
            return self.ram

    def stand_by(self) -> None:
        """Let go of a guest that was given away; the agent is standby afterwards. Refused unless it is frozen.

        Raises:
            AgentError, AgentLost.
        """
        self.link.stand_by()
        self._ready.clear()
        self.drop_ram()

    def drop_ram(self) -> None:
        """Forget RAM: the guest left this host, or the host ends."""
        with self._lock:
            self._drop()

    def _lost(self, reason: str) -> None:
        if (listener := self._lost_listener) is not None:
            listener(reason)
        # Last: whoever reads it may count on it that the migration under way has the news.
        self._events.add("guest_link_lost", reason=reason)
        self._wanted.set()

    def _notified(self, event: str, fields: Mapping[str, object]) -> None:
        if event == "ready":
            self._announce_ready()
        else:
            self._events.add(f"guest_{event}", **fields)

    def _announce_ready(self) -> None:
        if not self._ready.is_set():
            self._ready.set()
            self._events.add("guest_ready")

    def _main(self) -> None:
        while not self._stopping.is_set():
            self._wanted.wait()  # ends: the link is lost, or the node stops
            self._wanted.clear()
            self._unwatched.wait()  # ends: the migration that listens for the loss ends, or the node stops
            self._attach()

    def _attach(self) -> None:
        while not self._stopping.is_set():
            try:
                self.link.connect(timeout=ATTACH_POLL_S)
                hello = self.link.hello()
                if hello.pid == self._pid and self._attached.is_set():
                    self._events.add("guest_link_found", state=hello.state, pid=hello.pid)
                else:
                    hello = self._adopt(hello)
            except AgentLost as error:
                if self.link.connected:
                    self._events.add("guest_silent", reason=str(error))
                continue
            except (HostError, OSError) as error:
                self._events.add("guest_unusable", reason=str(error))
                return
            if hello.ready:
                self._announce_ready()
            return

    def _adopt(self, hello: Hello) -> Hello:
        """Another process of the agent, the first one or one that was started again: what it says once it is ours.

        RAM of a process that is gone stays until another guest's takes its place: somebody may be reading it.
        """
        if self._attached.is_set():
            self._ready.clear()
            hello = self.link.hello()  # it may have said "ready" before that
        self._pid = hello.pid
        if hello.state != "standby":
            self.take_ram()
        self._on_attached()
        self._attached.set()
        self._events.add("guest_attached", pages=hello.pages, state=hello.state, pid=hello.pid)
        return hello

    def _drop(self) -> None:
        if self.scanner is not None:
            self.scanner.close()
            self.scanner = None
        if self.ram is not None:
            self.ram.close()
            self.ram = None
