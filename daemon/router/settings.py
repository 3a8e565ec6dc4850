"""What a router runs with, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from .keys import ApiKeys
from .policies import Policy
from .registration import IPNetwork

#: Threads that no relayed request gets: registration and health checks go on when all others are taken.
_RESERVED = 16


@dataclass(frozen=True, slots=True)
class Settings:
    host: str
    port: int
    policy: Policy
    threads: int
    #: Seconds of silence after which a replica's answer is given up.
    request_timeout: float
    max_body_bytes: int
    keys: ApiKeys
    allow_hosts: tuple[IPNetwork, ...]
    registry_file: Path | None
    #: Seconds that requests get to end after SIGTERM.
    graceful_timeout: int
    #: Seconds between two looks at a replica.
    health_interval: float

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be 1..65535")
        if self.threads <= _RESERVED:
            raise ConfigError(f"--threads is {self.threads}; it must be more than {_RESERVED}")
        if self.request_timeout <= 0:
            raise ConfigError(f"--request-timeout-secs is {self.request_timeout:g}; it must be more than 0")
        if self.max_body_bytes < 1:
            raise ConfigError(f"--max-body-bytes is {self.max_body_bytes}; it must be at least 1")
        if self.health_interval <= 0:
            raise ConfigError(
                f"--health-check-interval-secs is {self.health_interval:g}; it must be more than 0"
            )
        if self.graceful_timeout < 0:
            raise ConfigError(f"--graceful-timeout-secs is {self.graceful_timeout}; it must be at least 0")

    @property
    def max_in_flight(self) -> int:
        return self.threads - _RESERVED
