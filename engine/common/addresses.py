"""Addresses to listen on.

A name may resolve to several addresses of both families. Servers listen on all of them, because a client may
choose any.
"""

from __future__ import annotations

import ipaddress
import socket

from .errors import ConfigError


def addresses_of(host: str) -> tuple[str, ...]:
    """Return the IP addresses of a host to listen on, IPv4 first.

    Addresses that this machine does not have are omitted, because hosts files contain ``::1`` even if IPv6
    is disabled.

    Raises:
        ConfigError: `host` is neither an IP address nor a name of this machine.
    """
    if is_address(host):
        return (host,)
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host!r} is not a valid address ({reason}); use for example 127.0.0.1 or 0.0.0.0"
        ) from None
    addresses = dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found)
    own = sorted(filter(_can_be_bound, addresses), key=lambda address: ":" in address)
    if not own:
        raise ConfigError(
            f"{host!r} resolves to {', '.join(addresses)}, which this machine does not have; "
            "use for example 127.0.0.1 or 0.0.0.0"
        )
    return tuple(own)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_wildcard(host: str) -> bool:
    """Return True for an address that stands for all addresses of the machine."""
    return is_address(host) and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Return True for a loopback address, also for an IPv4 address in IPv6 form."""
    if not is_address(host):
        return False
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def authority(host: str, port: int) -> str:
    """Return HOST:PORT, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: str, port: int, backlog: int = 128) -> socket.socket:
    """Return a socket that listens on an IP address; ``::`` includes IPv4. Raises OSError."""
    listener = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            # Do not depend on net.ipv6.bindv6only.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not is_wildcard(address)))
        listener.bind((address, port))
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _can_be_bound(address: str) -> bool:
    try:
        listen(address, 0).close()
    except OSError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
