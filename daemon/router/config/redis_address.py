"""Address of the Redis through which routers share their boards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ....common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """URL of a Redis database, shown without its password."""

    url: str = field(repr=False)
    shown: str

    def __str__(self) -> str:
        return self.shown

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Parse a URL. Raises ConfigError, without the URL in its text: it may contain a password."""
        try:
            from redis.connection import parse_url
        except ImportError:
            raise ConfigError(
                "--board needs the package redis, which is not installed: pip install 'fd-dp[redis]'"
            ) from None
        try:
            parts: dict[str, Any] = parse_url(url)
            where = parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}"
            return cls(url, f"redis at {where}, database {parts.get('db', 0)}")
        except (ValueError, TypeError):
            raise ConfigError("--board must be redis://HOST:PORT/DB, rediss:// or unix://") from None
