"""Addresses for a run's own network: a /24 of the benchmarking range that nothing here uses.

Rule 1: only 198.18.0.0/15 (RFC 2544) is taken: it is nobody's on any network that is worth reaching.
Rule 2: what networks of the engine and routes of this machine cover is not taken, nor anything that overlaps it.
"""

from __future__ import annotations

import random
from ipaddress import IPv4Network, ip_network
from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

RANGE: Final = IPv4Network("198.18.0.0/15")
PREFIX_BITS: Final = 24


def candidates(taken: Iterable[IPv4Network], seed: str) -> Iterator[IPv4Network]:
    """Free subnets, in an order of the seed's: runs that start at the same moment try different ones first."""
    used = list(taken)
    subnets = list(RANGE.subnets(new_prefix=PREFIX_BITS))
    random.Random(seed).shuffle(subnets)
    return (subnet for subnet in subnets if not any(subnet.overlaps(other) for other in used))


def of_engine(networks: Iterable[Any]) -> Iterator[IPv4Network]:
    """The IPv4 subnets of an engine's networks."""
    for network in networks:
        for config in (network.attrs.get("IPAM") or {}).get("Config") or ():
            subnet = ip_network(config["Subnet"], strict=False) if config.get("Subnet") else None
            if isinstance(subnet, IPv4Network):
                yield subnet


def of_routes() -> Iterator[IPv4Network]:
    """Destinations of this machine's routes, without the default route, which covers everything."""
    with IPRoute() as netlink:
        for route in netlink.get_routes(family=2):  # AF_INET
            address = route.get_attr("RTA_DST")
            if address:
                yield IPv4Network(f"{address}/{route['dst_len']}", strict=False)
