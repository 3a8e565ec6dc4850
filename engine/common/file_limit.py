"""Open files (sockets, above all) a process may have: raised before they are needed."""

from __future__ import annotations

import resource

from .errors import ConfigError


def connections_of(threads: int) -> int:
    """Clients that an HTTP server with so many threads lets in at one time, idle ones included."""
    return 2 * threads


def descriptors_of(threads: int) -> int:
    """Files that such a server may have open.

    Per request: the client, the watch on it, and its upstream connection or what replaces it when it ends;
    per connection one; some for the rest.
    """
    return 3 * threads + connections_of(threads) + 256


def allow_open_files(needed: int, flag: str) -> None:
    """Raises the soft limit of this process and its children to `needed`, if it is lower.

    A server that runs out of descriptors in accept() falls over: better to say so before.

    Raises:
        ConfigError: the hard limit is lower; one line with `flag`, which asked for so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{flag} needs {needed} file descriptors and the limit is {hard}; "
            "raise it (ulimit -n, LimitNOFILE=) or choose a smaller number"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_files_limit() -> int:
    """The most files that this process may be allowed to have open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
