"""Address of the Redis that routers share their boards through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ....common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Shown without its password."""

    url: str = field(repr=False)
    shown: str

    def __str__(self) -> str:
        return self.shown

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Raises ConfigError, which does not show the URL either."""
        from redis.connection import parse_url

        try:
            parts: dict[str, Any] = parse_url(url)
            where = parts.get("path") or f"{parts.get('host', 'localhost')}:{parts.get('port', 6379)}"
            return cls(url, f"redis at {where}, database {parts.get('db', 0)}")
        except (ValueError, TypeError):
            raise ConfigError("--board must be redis://HOST:PORT/DB, rediss:// or unix://") from None
