"""What can go wrong with a fault."""

from testbed.errors import RunBrokenError


class FaultError(RunBrokenError):
    """A fault could not be applied or healed; one line says why."""


class OffNetworkError(FaultError):
    """The host has no interface with its address."""
