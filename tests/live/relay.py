"""The link of a test's run: the testbed's relay, in place of the destination's address."""

from testbed.crashes.relay import Relay as PlainRelay
from testbed.node_client import NodeClient


class Relay(PlainRelay):
    """Stands in for the destination's address of every run that is started while it is entered."""

    def __init__(self, monkeypatch):
        super().__init__()
        honest = NodeClient.describe

        def describe(client):
            told = honest(client)
            if client.origin == "dest":
                self.target, told.migration_address = told.migration_address, self.address
            return told

        monkeypatch.setattr(NodeClient, "describe", describe)
