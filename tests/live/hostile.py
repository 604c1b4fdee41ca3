"""A destination in this process, for peers that talk nonsense to it: the real server, intake, journal and memory.

Only the guest agent and the balloon device are stand-ins; what they were asked is written down.
"""

import contextlib
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np

from dest_node.arrivals import Arrivals
from dest_node.intake import Intake
from dest_node.servicer import MigrationServicer, register
from host.__main__ import MIGRATION_THREADS, make_server
from host.agent_link import Hello, RestoredImage
from host.context import HostContext
from host.event_log import EventLog
from host.journal import Journal
from host.points import Points
from host.refusals import CountRefusals
from migration.codec import ZERO_PAGE_HASH, ChunkHeader, encode_chunk, image_digest, page_hashes
from migration.pages import PAGE_BYTES
from migration.pb import migration_pb2 as pb
from migration.pb import migration_pb2_grpc
from tests.core.intake_bed import StandInBalloon

PAGES = 64
SERVICE = pb.DESCRIPTOR.services_by_name["Migration"].full_name
STATE = pb.DeviceState(next_command_id=2)
NO_PFNS, NO_COUNTS = np.empty(0, np.uint64), np.empty(0, np.uint32)


class StandInGuest:
    """An agent in standby: restores whatever it is given, and runs it when it is told so."""

    attached = True
    process_gone = False

    def __init__(self):
        self.link = self
        self.state, self.epoch, self.ran = "standby", 0, []

    def hello(self):
        return Hello(1, "ballast", self.state, self.epoch, PAGES, 0, 0, 0, False, 0, {}, 1, True)

    def restore(self, next_epoch, _vcpu_state, _device, fd):
        self.state, self.epoch = "restored", next_epoch - 1
        return RestoredImage(os.fstat(fd).st_size // PAGE_BYTES, 0)

    def run(self, epoch):
        self.state, self.epoch = "running", epoch
        self.ran.append(epoch)
        return 0

    def discard(self):
        self.state = "standby"

    def take_ram(self):
        pass


class HostileBed:
    """One server for many hosts: `fresh` makes another one behind it."""

    def __init__(self, directory):
        self._directory, self._made = Path(directory), 0
        self._stack, self._host_stack = ExitStack(), ExitStack()
        self._servicer = MigrationServicer(None, None)
        self.events = EventLog("dest")
        self._stack.callback(self.events.close)
        self.host = self._new_host()
        count = CountRefusals(self.host.refused, self.events)
        self._server = make_server("hostile", MIGRATION_THREADS, [count])
        register(self._servicer, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_send_message_length", 64 << 20)]
        )
        self.stub = migration_pb2_grpc.MigrationStub(self.channel)

    def close(self):
        self.channel.close()
        self._server.stop(None).wait()
        self.intake.stop()
        self._host_stack.close()
        self._stack.close()

    def _new_host(self):
        self._made += 1
        run_dir = self._directory / str(self._made)
        (run_dir / "artefacts").mkdir(parents=True)
        journal = self._host_stack.enter_context(Journal(run_dir / "journal"))
        self.guest = StandInGuest()
        host = HostContext(
            "dest", run_dir, 0, self.events, journal, self.guest, StandInBalloon(), SimpleNamespace(),
            SimpleNamespace(), Points(self.events),
        )  # fmt: skip
        self.intake = self._servicer._intake = Intake(host)
        self._servicer._arrivals = Arrivals(self.events)
        self.intake.recover_journal()
        self.intake.recover_guest()  # as a node does once it has found its agent
        return host

    def fresh(self):
        """Another host, which has heard nothing yet."""
        self.intake.stop()
        self._host_stack.close()
        self._host_stack = ExitStack()
        refused = self.host.refused
        self.host = self._new_host()
        object.__setattr__(self.host, "refused", refused)

    # -- calls ---------------------------------------------------------------------------------

    def open(self, key, **fields):
        chosen = {"memory_bytes": PAGES * PAGE_BYTES, "page_bytes": PAGE_BYTES, "integrity": "full"}
        return self.stub.Open(pb.OpenRequest(id=key, **(chosen | fields)), timeout=20)

    def raw(self, method, data, timeout=20):
        """A unary call, in bytes."""
        return self.channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=timeout)

    def pages(self, messages, timeout=20):
        """The call of a page stream."""
        read = pb.ChunkAck.FromString
        return self.channel.stream_stream(f"/{SERVICE}/Pages", response_deserializer=read)(
            iter(messages), timeout=timeout
        )

    def send(self, *messages):
        """How such a stream ended: its error, or None."""
        try:
            list(self.pages(messages))
        except grpc.RpcError as error:
            return error
        return None

    def honest(self, key):
        """A whole migration of one page; what Commit was answered."""
        incarnation = self.open(key).incarnation
        data = os.urandom(PAGE_BYTES)
        assert self.send(chunk(incarnation, key.attempt, 0, [3], data)) is None
        stored = np.zeros(PAGES, np.uint64)
        stored[3] = page_hashes(data)[0]
        digest = digest_of(stored)
        prepared = self.stub.Prepare(
            pb.PrepareRequest(id=key, incarnation=incarnation, image_digest=digest, device=STATE, chunks=1)
        )
        assert prepared.decision == pb.DECISION_PREPARED, prepared
        return self.stub.Commit(pb.CommitRequest(id=key, image_digest=digest)).decision

    def refused(self):
        """Refused calls so far, over all methods and kinds."""
        return sum(n for kinds in self.host.refused.counts().values() for n in kinds.values())


def key(attempt=1, *, migration="m", epoch=1):
    return pb.AttemptId(migration=migration, attempt=attempt, guest_epoch=epoch)


def digest_of(stored_hashes, state=b"", device=STATE):
    return image_digest(stored_hashes, state, device.SerializeToString(deterministic=True))


def chunk(incarnation, attempt, sequence, pfns, data=b"", *, stream=0, zero=False, **options):
    """A well-formed chunk."""
    first = np.array(pfns, np.uint64)
    count = np.ones(len(pfns), np.uint32)
    runs = (NO_PFNS, NO_COUNTS, first, count) if zero else (first, count, NO_PFNS, NO_COUNTS)
    header = ChunkHeader(incarnation, attempt, 1, sequence, stream)
    hashes = options.pop("hashes", None)
    if hashes is None:
        hashes = page_hashes(data) if data else np.empty(0, np.uint64)
    return encode_chunk(header, *runs, hashes, data, **options)


def code_of(call, *arguments, **fields):
    """The status of a call that may fail."""
    try:
        call(*arguments, **fields)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@contextlib.contextmanager
def hostile_bed(directory):
    bed = HostileBed(directory)
    try:
        yield bed
    finally:
        bed.close()


__all__ = ["PAGES", "STATE", "ZERO_PAGE_HASH", "chunk", "code_of", "digest_of", "hostile_bed", "key"]
