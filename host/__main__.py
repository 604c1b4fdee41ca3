"""`python -m host`: one node process, a host with the roles it is started with."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from host.agent_link import AgentLink
from host.balloon_server import BalloonServer
from host.context import HostContext
from host.device_log import DeviceLog
from host.errors import HostError, JournalLocked
from host.event_log import EventLog
from host.hint_relay import HintRelay
from host.journal import Journal
from host.local_guest import LocalGuest
from host.node import NodeService
from host.points import Points
from host.process import configure_logging, die_with_parent, keep_large_blocks
from host.refusals import CountRefusals
from host.resources import ResourceMeter
from host.roles import RoleRefused, load_role
from host.tls import Trust, is_loopback
from migration.partition import STREAMS_MAX
from migration.pb import migration_pb2, node_pb2, node_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from host.roles import Role

CONTROL_THREADS = 16  # a Watch occupies one for as long as it lasts
CONTROL_CALLS_MAX = 8  # Open, Prepare, Commit, Abort, Forget of the attempt at hand and of those before it
# Every page stream occupies one for as long as it lasts. After a loss that this end has not noticed the streams of
# the old connection still have theirs when Open(resume), and then the new ones, come.
MIGRATION_THREADS = 2 * STREAMS_MAX + CONTROL_CALLS_MAX
CALLS_MAX = (
    64  # under way or waiting for a thread, per server: beyond it a call is RESOURCE_EXHAUSTED at once
)
MESSAGE_BYTES_MAX = 8 << 20  # a chunk is little over 4 MiB; expectations and artefacts come in pieces
HANDSHAKE_MS_MAX = 20_000  # a connection that says nothing is closed; gRPC's own patience is two minutes
GRACE_S = 2.0  # for calls under way when the node ends; then they are cut
KEEPALIVE_MS = 5_000  # as the source's channel has it

log = structlog.get_logger()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m host", description=__doc__)
    parser.add_argument("--name", required=True, help="how this host is called in histories")
    parser.add_argument("--role", action="append", required=True, help="source, dest; may be repeated")
    parser.add_argument("--run-dir", required=True, type=Path, help="where node.json and artefacts go")
    parser.add_argument("--vhost-socket", required=True, help="where the balloon device listens")
    parser.add_argument("--agent-socket", required=True, help="where the guest agent listens")
    parser.add_argument("--journal", required=True, type=Path, help="SQLite file of the ownership journal")
    parser.add_argument("--control", default="127.0.0.1:0", help="Node service: unix:PATH or host:port")
    parser.add_argument("--migration-address", default="127.0.0.1:0", help="Migration service: host:port")
    parser.add_argument(
        "--guest-memory-max", type=int, default=0, metavar="BYTES", help="refuse larger guests (0: no limit)"
    )
    parser.add_argument(
        "--tls-dir",
        type=Path,
        help="ca.pem, cert.pem and key.pem (0600): TLS 1.3 on TCP, for this run's peers only",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow plain text beyond loopback; every plain port is told"
    )
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process ends")
    return parser.parse_args(argv)


def write_node_file(run_dir: Path, control: str, migration_address: str) -> None:
    """Tells the starter where we serve; atomic, so that a reader sees all or nothing."""
    target = run_dir / "node.json"
    draft = target.with_suffix(".tmp")
    draft.write_text(
        json.dumps({"pid": os.getpid(), "control": control, "migration_address": migration_address})
    )
    draft.replace(target)


def server_options() -> list[tuple[str, int]]:
    """Larger messages than the default of 4 MiB; a peer that went without a word is noticed; ours may ping."""
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # A source pings a silent stream every KEEPALIVE_MS; the default answers the third with GOAWAY.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", CALLS_MAX),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS_MAX),
    ]


def serve(options: argparse.Namespace, stop: threading.Event) -> None:
    """Everything with one owner each, undone in reverse."""
    with ExitStack() as stack:
        trust = Trust(options.tls_dir, insecure=options.insecure)
        events = EventLog(options.name)
        stack.callback(events.close)
        resources = ResourceMeter()
        stack.callback(resources.stop)
        journal = stack.enter_context(Journal(options.journal))
        device_log = DeviceLog()
        relay = HintRelay()
        balloon = BalloonServer(
            options.vhost_socket,
            sink=relay,
            log=device_log,
            state_path=options.journal.with_name(options.journal.name + ".device.json"),
        )
        balloon.start()
        stack.callback(balloon.stop)
        link = AgentLink(options.agent_socket)
        guest = LocalGuest(link, events)
        context = HostContext(
            name=options.name,
            run_dir=options.run_dir,
            guest_memory_bytes_max=options.guest_memory_max,
            events=events,
            journal=journal,
            guest=guest,
            balloon=balloon,
            device_log=device_log,
            resources=resources,
            points=Points(events),
            hints=relay,
            trust=trust,
        )
        context.artefacts_dir.mkdir(parents=True, exist_ok=True)
        roles = [load_role(name, context) for name in options.role]
        count = CountRefusals(context.refused, events)
        migration_server = make_server("migration", MIGRATION_THREADS, [count, *trust.hosts_only()])
        for role in roles:
            role.register(migration_server)
            stack.callback(role.stop)
        migration_address = trust.bind(migration_server, options.migration_address)
        service = NodeService(context, roles, migration_address, stop)
        only_control = trust.control_only(options.control)
        control_server = make_server("control", CONTROL_THREADS, [count, *only_control])
        control = trust.bind(control_server, options.control)
        add_services(control_server, service)
        stack.callback(lambda: control_server.stop(GRACE_S).wait())  # ends: after GRACE_S
        stack.callback(events.close)  # ends the watches, so that the control server need not wait for them
        stack.callback(lambda: migration_server.stop(GRACE_S).wait())  # ends: after GRACE_S
        events.add("node_started", roles=options.role, migration_address=migration_address)
        tell_plain_text(events, trust, migration_address, control)
        stack.callback(guest.stop)

        for role in roles:
            role.recover_journal()

        def recover() -> None:
            for role in roles:
                role.recover_guest()

        guest.start(on_attached=recover)
        migration_server.start()
        control_server.start()
        write_node_file(options.run_dir, control, migration_address)
        stop.wait()  # ends: a signal or Shutdown; serving is what a node does
        wind_up(context, roles)


def wind_up(context: HostContext, roles: Sequence[Role]) -> None:
    """The end in order: nobody is held at a point, the roles end what is under way, the last facts are told."""
    context.points.close()
    for role in reversed(roles):
        role.stop()
    context.events.add("node_resources", **context.resources.fields())
    context.events.add("node_stopping")


def make_server(name: str, threads: int, interceptors: list[grpc.ServerInterceptor]) -> grpc.Server:
    """One of the node's two, with its threads."""
    pool = futures.ThreadPoolExecutor(threads, name)
    return grpc.server(
        pool, options=server_options(), interceptors=interceptors, maximum_concurrent_rpcs=CALLS_MAX
    )


def tell_plain_text(events: EventLog, trust: Trust, *addresses: str) -> None:
    """Whoever reads the history knows which ports anybody could have read."""
    plain = [address for address in addresses if not address.startswith("unix:")]
    if plain and not trust.encrypts:
        events.add("plain_text", addresses=plain, loopback=all(is_loopback(address) for address in plain))


def add_services(server: grpc.Server, service: NodeService) -> None:
    """Node, health and reflection on the control port."""
    node_pb2_grpc.add_NodeServicer_to_server(service, server)
    checker = health.HealthServicer()
    node_name = node_pb2.DESCRIPTOR.services_by_name["Node"].full_name
    checker.set("", health_pb2.HealthCheckResponse.SERVING)
    checker.set(node_name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    names = (
        node_name,
        migration_pb2.DESCRIPTOR.services_by_name["Migration"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)


def main(argv: list[str] | None = None) -> int:
    """Runs until SIGTERM, SIGINT or Shutdown. Exit codes: 0 asked to end, 1 could not start, 3 role unknown."""
    options = arguments(argv)
    if options.die_with_parent:
        die_with_parent()
    configure_logging()
    keep_large_blocks()
    os.umask(0o077)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(options, stop)
    except RoleRefused as error:
        log.error("cannot_start", reason=str(error))  # noqa: TRY400 - one line, no traceback
        return 3
    except (JournalLocked, HostError, OSError) as error:
        log.error("cannot_start", reason=str(error))  # noqa: TRY400
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
