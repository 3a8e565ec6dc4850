"""What a router runs with, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext
from typing import TYPE_CHECKING

from ....common.api_keys import ApiKeys
from ....common.cors import CorsPolicy
from ....common.errors import ConfigError
from ..addresses import IPNetwork
from ..policy.policy import Policy

if TYPE_CHECKING:
    from .redis_address import RedisAddress

#: As many as the board has columns for, and as many again while a reload replaces them.
_MOST_WORKERS = 16
_DAY = 86400
#: fd-dp reports an ending within a second or two, later on a machine that is busy with restarts.
_ENDING_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Settings:
    #: IP addresses to listen on.
    addresses: tuple[str, ...]
    port: int
    policy: Policy
    workers: int
    #: Clients connected at a time, for each worker.
    max_connections: int
    #: Requests under way at a time, for each worker.
    max_in_flight: int
    #: Requests that wait for a replica that is not full, in each worker, and seconds that they do.
    queue_size: int
    queue_timeout: float
    #: Seconds of silence after which an answer of a replica that gives no signs of life is given up,
    request_timeout: float
    #: and one of a replica that does.
    progress_timeout: float
    max_body_bytes: int
    #: Seconds that a client gets for each step, and without a request between two.
    client_timeout: float
    keep_alive: float
    #: What clients of /v1 must show; registrations from other machines; and those who drain replicas.
    keys: ApiKeys
    register_keys: ApiKeys
    admin_keys: ApiKeys
    allow_hosts: tuple[IPNetwork, ...]
    #: Web pages that may read answers of /v1.
    cors: CorsPolicy
    registry_file: Path | None
    #: A unix socket on which no admin key is asked for.
    admin_socket: Path | None
    #: Seconds that requests get to end after SIGTERM.
    graceful_timeout: int
    #: Seconds without a sign of life after which a worker is replaced.
    worker_timeout: int
    #: Seconds between two looks at a replica.
    health_interval: float
    #: Shared with routers on other machines.
    redis: RedisAddress | None
    tls: SSLContext | None
    log_level: str
    #: Fingerprint of the flags file; None if there is none.
    flags: str | None

    @property
    def is_supervised(self) -> bool:
        """Replicas are started again after a loss: by fd-dp, which is there if there is an admin socket."""
        return self.admin_socket is not None

    @property
    def ending_patience(self) -> float:
        """Seconds to wait for fd-dp's report on how a replica ended."""
        return _ENDING_PATIENCE if self.is_supervised else 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be 1..65535")
        if not 1 <= self.workers <= _MOST_WORKERS:
            raise ConfigError(f"--workers is {self.workers}; it must be 1..{_MOST_WORKERS}")
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
        # A worker gives a sign of life each second.
        for name, number, least in (
            ("--graceful-timeout-secs", self.graceful_timeout, 0),
            ("--worker-timeout-secs", self.worker_timeout, 3),
        ):
            if not least <= number <= _DAY:
                raise ConfigError(f"{name} is {number}; it must be {least}..{_DAY}")
