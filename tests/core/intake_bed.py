"""A real intake over a real journal, with a stand-in for the agent: what the tests of a destination share."""

from types import SimpleNamespace

import numpy as np

from dest_node.intake import Intake
from host.agent_link import Hello, RestoredImage
from host.errors import AgentError
from host.journal import Journal
from host.points import Points
from migration.codec import ChunkHeader, encode_chunk, image_digest, page_hashes
from migration.identity import AttemptKey
from migration.pages import PAGE_BYTES
from migration.pb import migration_pb2 as pb

PAGES = 8
KEY = AttemptKey("m", 1, 1)
STATE = pb.DeviceState(next_command_id=2)


class Events:
    """Remembers the names, in order, and the newest fields of each."""

    def __init__(self):
        self.names, self.fields = [], {}

    def add(self, name, **fields):
        self.names.append(name)
        self.fields[name] = fields


class StandInAgent:
    """An agent that obeys, and remembers what it was told."""

    attached, ram = True, None

    def __init__(self, state="standby", epoch=0):
        self.link, self.state, self.epoch, self.process_gone = self, state, epoch, False
        self.told = []

    def hello(self):
        return Hello(1, "ballast", self.state, self.epoch, PAGES, 0, 0, 0, False, 0, {}, 1, True)

    def restore(self, next_epoch, _state, _device, _fd):
        self.told.append("restore")
        self.state, self.epoch = "restored", next_epoch - 1
        return RestoredImage(PAGES, 0)

    def run(self, epoch):
        self.told.append("run")
        if self.state not in ("restored", "running"):
            raise AgentError("run", f"the guest is {self.state}")
        self.state, self.epoch = "running", epoch
        return 0

    def discard(self):
        self.told.append("discard")
        self.state = "standby"

    def take_ram(self):
        self.told.append("ram")

    def drop_ram(self):
        self.ram = None


class StandInBalloon:
    """A device that takes over what it is told."""

    def adopt_state(self, state, pages):
        pass

    def ballooned(self, pages):
        return np.zeros(pages, np.bool_)

    def hints_done(self):
        pass


class Bed:
    """One host's destination; `restarted` is the next process over the same journal and agent."""

    def __init__(self, directory, agent=None, journal=None):
        self.directory, self.agent, self.events = directory, agent or StandInAgent(), Events()
        self.journal = journal or Journal(directory / "journal")
        self.artefacts = directory / "artefacts"
        self.artefacts.mkdir(exist_ok=True)
        host = SimpleNamespace(
            name="dest", journal=self.journal, events=self.events, guest=self.agent, balloon=StandInBalloon(),
            points=Points(self.events), guest_memory_bytes_max=0, artefacts_dir=self.artefacts,
        )  # fmt: skip
        self.intake = Intake(host)

    def restarted(self):
        """A process that has read its journal and has not found its agent yet."""
        self.close()
        bed = Bed(self.directory, self.agent, self.journal)
        bed.intake.recover_journal()
        return bed

    def close(self):
        self.intake._silence.cancel()
        self.intake.settled(10)

    def open(self, key=KEY, integrity="full", **options):
        return self.intake.open(key, PAGES * PAGE_BYTES, integrity, **options)

    def store(self, stream=None, *, key=KEY, pfn=3, sequence=0):
        """One page, on a stream of its own if none is given."""
        receiver = self.intake.receiver()
        stream = stream or receiver.begin_stream(lambda: None)
        receiver.store(stream, chunk(receiver, key, pfn, sequence))
        return stream

    def digest(self):
        hashes = self.intake.receiver().stored_hashes
        return image_digest(hashes, b"", STATE.SerializeToString(deterministic=True))

    def prepare(self, key=KEY, digest=None, **fields):
        """After `store`; the reply."""
        receiver = self.intake._receiver
        request = pb.PrepareRequest(
            incarnation=receiver.incarnation if receiver else "?", device=STATE,
            image_digest=self.digest() if digest is None else digest,
            chunks=receiver.stored_chunks if receiver else 0, **fields,
        )  # fmt: skip
        return self.intake.prepare(key, request)

    def prepared(self, key=KEY, **options):
        """A whole attempt up to PREPARED; its digest."""
        self.open(key, **options)
        stream = self.store(key=key)
        self.intake.receiver().end_stream(stream)
        digest = self.digest()
        self.prepare(key)
        return digest


def chunk(receiver, key, pfn, sequence):
    data = bytes([sequence + 1]) * PAGE_BYTES
    none = np.empty(0, np.uint64), np.empty(0, np.uint32)
    header = ChunkHeader(receiver.incarnation, key.attempt, 1, sequence)
    run = np.array([pfn], np.uint64), np.array([1], np.uint32)
    return encode_chunk(header, *run, *none, page_hashes(data), data)
