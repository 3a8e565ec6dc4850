"""Periodic registration of this replica with a router: FastDeploy's heartbeat (POST /register).

An unhealthy replica stops registering; the router detects failures itself. A stopping replica deregisters
(POST /deregister), which FastDeploy's own routers answer with 404.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..common.addresses import is_loopback, is_wildcard
from ..common.api_keys import keys_in_variable
from ..common.errors import ConfigError
from ..common.foreign_text import printable
from ..common.http_client import HttpError, Response, request

logger = logging.getLogger(__name__)

#: FastDeploy's interval; its routers remove an instance only when a health check fails.
_INTERVAL_SECONDS = 5.0
#: Interval until a registration succeeds; shorter, because the replica gets no requests in this time.
_RETRY_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0
#: Timeout of a deregistration in seconds; routers respond at once.
DEREGISTER_SECONDS = 2
#: Optional features that a router may use; see resumption.py.
_FEATURES = ["resume", "progress"]


@dataclass(frozen=True, slots=True)
class Address:
    """Addresses and ports of this replica."""

    #: All bound IP addresses.
    addresses: tuple[str, ...]
    port: int
    metrics_port: int
    engine_worker_queue_port: int
    #: Data-parallel rank.
    replica: int


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of one run of a replica; the next run at the same address has another one."""

    max_concurrency: int
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    #: Secret that authenticates routers which this replica has registered with.
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


class Registration(threading.Thread):
    """Thread that registers while `is_healthy()` returns True, until `stop` or `leave`.

    `read_numeric_version` is called when the replica is healthy.

    It logs failures when they begin, change or end.

    Raises:
        ConfigError: `router` is not the address of a router, or FD_ROUTER_REGISTER_KEY is not a key.
    """

    def __init__(
        self,
        router: str,
        address: Address,
        identity: Identity,
        is_healthy: Callable[[], bool],
        read_numeric_version: Callable[[], str],
    ) -> None:
        super().__init__(name="registration", daemon=True)
        self._router = router_url(router)
        # Routers require it of replicas on other machines.
        keys = keys_in_variable("FD_ROUTER_REGISTER_KEY", os.environ)
        self._key = keys[0] if keys else ""
        self._address = address
        self._identity = identity
        self._is_healthy = is_healthy
        self._read_numeric_version = read_numeric_version
        self._stopped = threading.Event()
        self._is_leaving = False
        #: Problem of the last attempt; None after a success, empty before the first attempt.
        self._problem: str | None = ""

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._is_healthy():
                    self._log_change(self._register())
            except Exception as error:
                # If this thread ended, the router would lose a working replica.
                self._log_change(f"{type(error).__name__}: {error}")
            self._stopped.wait(_INTERVAL_SECONDS if self._problem is None else _RETRY_SECONDS)
        # A registration that failed may still have arrived.
        if self._is_leaving and self._problem != "":
            self._deregister()

    def stop(self) -> None:
        """End the thread before its next registration, without waiting for a pending one."""
        self._stopped.set()

    def leave(self, timeout: float = DEREGISTER_SECONDS) -> None:
        """Stop registering and deregister. Return after at most `timeout` seconds."""
        self._is_leaving = True
        self._stopped.set()
        # Deregister in the same thread, so that no later registration can bring the replica back.
        self.join(timeout)

    def _deregister(self) -> None:
        try:
            host_ip = advertised_ip(self._address.addresses, self._router)
            body = {
                "host_ip": host_ip,
                "port": str(self._address.port),
                "instance": self._identity.instance,
            }
            response = self._post("/deregister", body, DEREGISTER_SECONDS)
        except (HttpError, OSError) as error:
            logger.info("could not deregister from router %s: %s", self._router, error)
        else:
            logger.info("deregistered from router %s: HTTP %d", self._router, response.status)

    def _register(self) -> str | None:
        try:
            host_ip = advertised_ip(self._address.addresses, self._router)
            info = register_info(self._address, self._identity, host_ip, self._read_numeric_version())
            response = self._post("/register", info, _TIMEOUT_SECONDS)
        except HttpError as error:
            return str(error)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        if not 200 <= response.status < 300:
            return f"HTTP {response.status}: {printable(response.body.decode(errors='replace').strip())}"
        return None

    def _post(self, path: str, fields: dict[str, Any], timeout: float) -> Response:
        url = urllib.parse.urlsplit(self._router)
        tls = url.scheme == "https"
        return request(
            (url.hostname or "", url.port or (443 if tls else 80)),
            "POST",
            urllib.parse.quote(url.path, safe="/%") + path,
            timeout=timeout,
            fields=fields,
            key=self._key,
            tls=tls,
        )

    def _log_change(self, problem: str | None) -> None:
        if problem == self._problem:
            return
        self._problem = problem
        if problem is None:
            logger.info("registered with router %s", self._router)
        else:
            logger.warning("cannot register with router %s: %s; retrying", self._router, problem)


def register_info(address: Address, identity: Identity, host_ip: str, numeric_version: str) -> dict[str, Any]:
    """Return the body of POST /register: FastDeploy's InstanceInfo, and from `replica` on our own fields.

    FastDeploy's fields for disaggregated serving (connector, RDMA) are omitted: this engine does not support
    it.
    """
    return {
        "role": "mixed",
        "host_ip": host_ip,
        "port": str(address.port),
        "metrics_port": str(address.metrics_port),
        "engine_worker_queue_port": str(address.engine_worker_queue_port),
        "tp_size": 1,
        "replica": address.replica,
        "instance": identity.instance,
        "features": _FEATURES,
        "max_concurrency": identity.max_concurrency,
        "token": identity.token,
        "numeric_version": numeric_version,
    }


def router_url(text: str) -> str:
    """Return the URL of a router. FastDeploy's `--router "0.0.0.0:30000"` has no scheme and a wildcard host.

    Raises:
        ConfigError: `text` is not HOST:PORT or an HTTP URL.
    """
    wanted = f"--router is {text!r}; it must be HOST:PORT or http://HOST:PORT"
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
        host, port = url.hostname, url.port
    except ValueError:
        raise ConfigError(wanted) from None
    if url.scheme not in ("http", "https") or not host or url.query or url.fragment or url.username:
        raise ConfigError(wanted)
    if port == 0 or (port is None and "://" not in text):
        raise ConfigError(wanted)
    if is_wildcard(host):
        host = "::1" if ":" in host else "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"{url.scheme}://{host}{f':{port}' if port else ''}{url.path.rstrip('/')}"


def advertised_ip(listening: Sequence[str], router: str) -> str:
    """Return an IP address under which the router reaches this replica; routers refuse host names.

    The replica listens on it. If possible it is the address that this machine uses to connect to the router.

    Args:
        listening: IP addresses that the replica listens on.

    Raises:
        OSError: the router's name does not resolve, there is no route, or the replica does not listen on any
            address family of the router.
    """
    own = _own_addresses_towards(router)
    for address in own:
        if address in listening or any(_includes(wildcard, address) for wildcard in listening):
            return address
    single = [address for address in listening if not is_wildcard(address)]
    if single:
        is_far = any(not is_loopback(address) for address in own)
        return next((address for address in single if is_far and not is_loopback(address)), single[0])
    if any(map(is_loopback, own)):
        # The router is on this machine, and any address of this machine will do.
        return "::1" if ":" in listening[0] else "127.0.0.1"
    raise OSError(f"{router} cannot reach a replica that listens on {' and '.join(listening)}")


def _own_addresses_towards(router: str) -> list[str]:
    """Return the source addresses that this machine uses to reach each address of the router."""
    target = urllib.parse.urlsplit(router)
    own = []
    for family, kind, _, _, sockaddr in socket.getaddrinfo(
        target.hostname, target.port or 80, type=socket.SOCK_DGRAM
    ):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing; the kernel only looks up the route.
            probe.connect(sockaddr)
            own.append(str(probe.getsockname()[0]))
    return own


def _includes(wildcard: str, address: str) -> bool:
    """Return True if a listener on `wildcard` has this address; ``::`` includes IPv4."""
    return is_wildcard(wildcard) and (":" in wildcard or ":" not in address)
