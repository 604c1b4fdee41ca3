"""A process that holds nothing but a balloon device, so that a test can kill it: one JSON call a line.

python -m tests.live.balloon_node SOCKET STATE
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from host.balloon_server import BalloonServer
from host.device_log import DeviceLog


def say(what: object) -> None:
    """One line of JSON to whoever started us."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until standard input ends."""
    socket_path, state_path = map(Path, sys.argv[1:])
    server = BalloonServer(socket_path, sink=lambda _batch: None, log=DeviceLog(), state_path=state_path)
    server.start()
    say("serving")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        result = getattr(server, name)(*arguments)
        if name == "status":
            result = asdict(result)
        elif name == "close_hints":
            result = len(result.pfn_first)
        elif name == "guest_stats":
            result = result.values
        say(result)
    server.stop()


if __name__ == "__main__":
    main()
