"""Settings of a router, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import TYPE_CHECKING

from ....common.api_keys import ApiKeys
from ....common.cors import CorsPolicy
from ....common.errors import ConfigError
from ....common.tracing_config import TracingConfig
from ..addresses import IPNetwork
from ..policy.policy import Policy

if TYPE_CHECKING:
    from .redis_address import RedisAddress

#: Maximum number of workers: half of the board's slots, because a reload runs old and new ones.
_MAX_WORKERS = 16
_DAY = 86400
#: Seconds to wait for fd-dp's report of an ending. It takes one or two, more on a machine busy with restarts.
_ENDING_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    #: IP addresses to listen on.
    addresses: tuple[str, ...]
    port: int
    policy: Policy
    workers: int
    #: Maximum client connections per worker.
    max_connections: int
    #: Maximum requests in flight per worker.
    max_in_flight: int
    #: Maximum requests per worker that wait while all replicas are full, and seconds that each waits.
    queue_size: int
    queue_timeout: float
    #: Seconds without data after which a request fails, for replicas that send no keep-alives.
    request_timeout: float
    #: Seconds without data after which a replica counts as dead, for replicas that send keep-alives.
    progress_timeout: float
    max_body_bytes: int
    #: Seconds that a client may pause within a request or response, and between two requests.
    client_timeout: float
    keep_alive: float
    #: Keys for /v1, for registrations from other machines, and for /admin.
    keys: ApiKeys
    register_keys: ApiKeys
    admin_keys: ApiKeys
    allow_hosts: tuple[IPNetwork, ...]
    #: Web pages that may read responses of /v1.
    cors: CorsPolicy
    #: Serve the page at /, and its figures.
    page: bool
    registry_file: Path | None
    #: Unix socket on which /admin needs no key.
    admin_socket: Path | None
    #: Seconds that requests get to complete after SIGTERM.
    graceful_timeout: int
    #: Seconds without a heartbeat after which a worker is replaced.
    worker_timeout: int
    #: Seconds between two health checks of a replica.
    health_interval: float
    #: Redis through which the board is shared with routers on other machines.
    redis: RedisAddress | None
    tls: SSLContext | None
    log_level: str
    #: Fingerprint of the flags file; None without one.
    flags: str | None
    #: Where the spans of requests go; None: there are none.
    tracing: TracingConfig | None = None

    @property
    def is_supervised(self) -> bool:
        """True if lost replicas are restarted. The admin socket shows that fd-dp runs this router."""
        return self.admin_socket is not None

    @property
    def ending_patience(self) -> float:
        """Seconds to wait for fd-dp's report of how a replica ended."""
        return _ENDING_PATIENCE if self.is_supervised else 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be 1..65535")
        if not 1 <= self.workers <= _MAX_WORKERS:
            raise ConfigError(f"--workers is {self.workers}; it must be 1..{_MAX_WORKERS}")
        for name, number in (
            ("--max-connections", self.max_connections),
            ("--max-in-flight", self.max_in_flight),
            ("--max-body-bytes", self.max_body_bytes),
        ):
            if number < 1:
                raise ConfigError(f"{name} is {number}; it must be at least 1")
        for name, seconds in (
            ("--request-timeout-secs", self.request_timeout),
            ("--progress-timeout-secs", self.progress_timeout),
            ("--queue-timeout-secs", self.queue_timeout),
            ("--client-timeout-secs", self.client_timeout),
            ("--keep-alive-secs", self.keep_alive),
            ("--health-check-interval-secs", self.health_interval),
        ):
            if not seconds > 0:
                raise ConfigError(f"{name} is {seconds:g}; it must be more than 0")
        if self.queue_size < 0:
            raise ConfigError(f"--queue-size is {self.queue_size}; it must be at least 0")
        # Workers send a heartbeat each second.
        for name, number, minimum in (
            ("--graceful-timeout-secs", self.graceful_timeout, 0),
            ("--worker-timeout-secs", self.worker_timeout, 3),
        ):
            if not minimum <= number <= _DAY:
                raise ConfigError(f"{name} is {number}; it must be {minimum}..{_DAY}")
