"""Addresses from which replicas may register."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class AllowedAddresses:
    """Addresses that a replica may have: those of this machine, and the networks of --allow-host."""

    def __init__(self, networks: Iterable[IPNetwork] = ()) -> None:
        self._networks = tuple(networks)

    def __contains__(self, address: str) -> bool:
        ip = _ip(address)
        return ip is not None and (any(ip in network for network in self._networks) or self.is_own(address))

    def is_own(self, address: str) -> bool:
        """Return True if this is an IP address of this machine."""
        ip = _ip(address)
        return ip is not None and (ip.is_loopback or _is_own(ip))


def _ip(address: str) -> IPAddress | None:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _is_own(ip: IPAddress) -> bool:
    """Return True if packets to the address would also come from it: only those of this machine do."""
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            # `connect` looks up the route and sends nothing. `bind` would be wrong for broadcast and
            # multicast addresses, and where net.ipv4.ip_nonlocal_bind is set.
            probe.connect((str(ip), 9))
        except OSError:
            return False  # no route, or not the address of one machine
        return bool(ipaddress.ip_address(probe.getsockname()[0]) == ip)
