"""Tells a router that this replica is there, again and again: FastDeploy's heartbeat (POST /register).

A replica that is not healthy stops registering; the router sees the rest itself. One that is going to stop
says so (POST /deregister), which FastDeploy's routers do not know and answer with 404.
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

import requests

from ..common.addresses import is_loopback, is_wildcard
from ..common.api_keys import keys_in_variable
from ..common.errors import ConfigError
from ..common.foreign_text import printable

logger = logging.getLogger(__name__)

#: FastDeploy's rhythm; its routers forget an instance only when a health check fails.
_BEAT_SECONDS = 5.0
#: Until the router knows us, ask more often: this is time in which a fresh replica gets no work.
_FIRST_BEAT_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0
#: A router answers a farewell at once, or is not worth waiting for.
FAREWELL_SECONDS = 2
#: What a router may ask of this replica; see resumption.py.
_FEATURES = ["resume", "progress"]


@dataclass(frozen=True, slots=True)
class Address:
    """Where this replica listens."""

    #: IP addresses, all of which are bound.
    addresses: tuple[str, ...]
    port: int
    metrics_port: int
    engine_worker_queue_port: int
    #: Its number among the replicas (DP rank).
    replica: int


@dataclass(frozen=True, slots=True)
class Identity:
    """One start of a replica: another start at the same address is somebody else."""

    max_concurrency: int
    instance: str = field(default_factory=lambda: secrets.token_hex(16))
    #: Whoever shows it is a router that this replica has registered with.
    token: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)


class Registration(threading.Thread):
    """Registers while `is_healthy()` says yes, until `stop` or `leave`. Failures are logged when they begin
    and end.

    Raises:
        ConfigError: `router` is no address of a router, or FD_ROUTER_REGISTER_KEY no key.
    """

    def __init__(
        self, router: str, address: Address, identity: Identity, is_healthy: Callable[[], bool]
    ) -> None:
        super().__init__(name="registration", daemon=True)
        self._router = router_url(router)
        self._keys = keys_in_variable("FD_ROUTER_REGISTER_KEY", os.environ)
        self._address = address
        self._identity = identity
        self._is_healthy = is_healthy
        self._stopped = threading.Event()
        self._is_leaving = False
        #: What was wrong with the last attempt; None after a success, empty before the first attempt.
        self._trouble: str | None = ""

    def run(self) -> None:
        with requests.Session() as session:
            # A proxy for the outside world has no business between a replica and its router.
            session.trust_env = False
            # What a router asks replicas of other machines for.
            if self._keys:
                session.headers["Authorization"] = f"Bearer {self._keys[0]}"
            while not self._stopped.is_set():
                try:
                    if self._is_healthy():
                        self._note(self._register(session))
                except Exception as error:
                    # If this thread ended, the router would forget a working replica.
                    self._note(f"{type(error).__name__}: {error}")
                self._stopped.wait(_BEAT_SECONDS if self._trouble is None else _FIRST_BEAT_SECONDS)
            # A beat that has failed may have arrived all the same.
            if self._is_leaving and self._trouble != "":
                self._deregister(session)

    def stop(self) -> None:
        """Ends the thread before its next beat; does not wait for one that is under way."""
        self._stopped.set()

    def leave(self, timeout: float = FAREWELL_SECONDS) -> None:
        """Registers no more and tells the router that this replica goes; returns after `timeout` seconds at
        the latest, whatever the router does."""
        self._is_leaving = True
        self._stopped.set()
        # The thread that registers says it, so that no beat can overtake it and bring the replica back.
        self.join(timeout)

    def _deregister(self, session: requests.Session) -> None:
        try:
            host_ip = advertised_ip(self._address.addresses, self._router)
            farewell = {
                "host_ip": host_ip,
                "port": str(self._address.port),
                "instance": self._identity.instance,
            }
            answer = session.post(
                f"{self._router}/deregister", json=farewell, timeout=FAREWELL_SECONDS, allow_redirects=False
            )
        except (requests.RequestException, OSError) as error:
            logger.info("router %s was not told of the stop: %s", self._router, type(error).__name__)
        else:
            logger.info("told router %s of the stop: HTTP %d", self._router, answer.status_code)

    def _register(self, session: requests.Session) -> str | None:
        try:
            host_ip = advertised_ip(self._address.addresses, self._router)
            info = register_info(self._address, self._identity, host_ip)
            answer = session.post(
                f"{self._router}/register", json=info, timeout=_TIMEOUT_SECONDS, allow_redirects=False
            )
        except requests.Timeout:
            return f"no answer within {_TIMEOUT_SECONDS:.0f} s"
        except requests.ConnectionError:
            # Its text names objects by address and would look new every time.
            return "cannot connect"
        except (requests.RequestException, OSError) as error:
            return f"{type(error).__name__}: {error}"
        # Redirects are not followed: the registration holds a secret.
        if not 200 <= answer.status_code < 300:
            return f"HTTP {answer.status_code}: {printable(answer.text.strip())}"
        return None

    def _note(self, trouble: str | None) -> None:
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble is None:
            logger.info("registered with router %s", self._router)
        else:
            logger.warning("cannot register with router %s: %s; trying on", self._router, trouble)


def register_info(address: Address, identity: Identity, host_ip: str) -> dict[str, Any]:
    """The body of POST /register: FastDeploy's InstanceInfo, and from `replica` on what our routers know.

    The fields for disaggregated serving (connector, RDMA) are left out: this engine does not do it.
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
    }


def router_url(text: str) -> str:
    """FastDeploy writes `--router "0.0.0.0:30000"`: no scheme, and every address where one is meant."""
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
    """Return the IP address under which the router reaches a replica; routers refuse names.

    The replica listens on it. If possible it is the address that this machine uses on the way to the router.

    Args:
        listening: IP addresses that the replica listens on.

    Raises:
        OSError: the router's name does not resolve, there is no route at present, or the router has only
            addresses of the family that the replica does not listen on.
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
    """Return the addresses that this machine uses on the way to each address of the router."""
    target = urllib.parse.urlsplit(router)
    own = []
    for family, kind, _, _, sockaddr in socket.getaddrinfo(
        target.hostname, target.port or 80, type=socket.SOCK_DGRAM
    ):
        with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
            # Connecting a datagram socket sends nothing; it only looks up the route.
            probe.connect(sockaddr)
            own.append(str(probe.getsockname()[0]))
    return own


def _includes(wildcard: str, address: str) -> bool:
    """Return True if a listener on `wildcard` has this address; ``::`` includes IPv4."""
    return is_wildcard(wildcard) and (":" in wildcard or ":" not in address)
