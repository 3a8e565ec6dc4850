"""Cross-origin resource sharing: which web pages may read the responses of a router or a replica.

A browser sends the page's origin with each request to another host, and shows the page a response only if its
headers allow that origin. Keys are in a header that pages set themselves, never in cookies, so no response
allows credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ConfigError

#: Words in a list of origins: pages of this machine, and all pages. Any other entry is an origin.
LOOPBACK, EVERY = "loopback", "*"
DEFAULT = (LOOPBACK,)

Headers = tuple[tuple[str, str], ...]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._~:\[\]-]+", re.ASCII)
_LOOPBACK_ORIGIN = re.compile(
    r"https?://(?:(?:[a-z0-9-]+\.)*localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::\d{1,5})?", re.ASCII
)
#: Comma-separated header names.
_HEADER_NAMES = re.compile(r"[\w!#$%&'*+.^`|~, -]{1,4096}", re.ASCII)
_METHODS = "GET, POST, OPTIONS"
#: Response headers that pages may read, besides those that browsers always allow.
_EXPOSED = "X-Request-Id, Retry-After"
#: Seconds for which a browser may reuse the response to a preflight.
_MAX_AGE = "600"


def problem_of(origin: str) -> str | None:
    """Return what is wrong with an entry of a list of origins; None if it is valid."""
    if origin in (LOOPBACK, EVERY) or _ORIGIN.fullmatch(origin):
        return None
    return (
        f"{origin!r} is not an origin as browsers send it; write SCHEME://HOST or SCHEME://HOST:PORT in "
        f'lower case and without a path, "{LOOPBACK}" for pages of this machine, or "{EVERY}" for all'
    )


@dataclass(frozen=True, slots=True)
class CorsPolicy:
    """The origins that are allowed."""

    origins: frozenset[str] = frozenset(DEFAULT)

    @classmethod
    def parse(cls, flag: str, text: str) -> CorsPolicy:
        """Return the policy of a comma-separated list; an empty list allows no origin.

        Raises:
            ConfigError: an entry is not an origin; the message names `flag`.
        """
        origins = [word.strip() for word in text.split(",") if word.strip()]
        _check(flag, origins)
        return cls(frozenset(origins))

    def allows(self, origin: str) -> bool:
        if EVERY in self.origins:
            return True
        if LOOPBACK in self.origins and _LOOPBACK_ORIGIN.fullmatch(origin):
            return True
        return origin in self.origins and origin != LOOPBACK

    def headers(self, origin: str) -> Headers:
        """Return the headers to add to the response to a request with this Origin header."""
        allowed, vary = self._allowed(origin), self._vary()
        return (*allowed, ("Access-Control-Expose-Headers", _EXPOSED), *vary) if allowed else vary

    def preflight_headers(self, origin: str, wanted: str) -> Headers:
        """Return the headers of the response to a preflight; only Vary if the origin is not allowed.

        Args:
            wanted: the header names in Access-Control-Request-Headers. All are allowed, because clients send
                many headers of their own.
        """
        allowed, vary = self._allowed(origin), self._vary()
        if not allowed:
            return vary
        names = (("Access-Control-Allow-Headers", wanted),) if _HEADER_NAMES.fullmatch(wanted) else ()
        return (
            *allowed,
            ("Access-Control-Allow-Methods", _METHODS),
            *names,
            ("Access-Control-Max-Age", _MAX_AGE),
            *vary,
        )

    def _allowed(self, origin: str) -> Headers:
        if not self.allows(origin):
            return ()
        return (("Access-Control-Allow-Origin", EVERY if EVERY in self.origins else origin),)

    def _vary(self) -> Headers:
        return () if EVERY in self.origins else (("Vary", "Origin"),)


def refusal_of(origin: str) -> str:
    """Return the error message for a preflight from an origin that is not allowed."""
    return (
        f"the origin {origin[:200]!r} is not allowed; add it to --cors-origins, which fd-dp takes from "
        "cors_origins of [router] in dp.toml"
    )


def _check(flag: str, origins: Iterable[str]) -> None:
    for origin in origins:
        if problem := problem_of(origin):
            raise ConfigError(f"{flag}: {problem}")
