"""The limit of open files of a process, raised before the files (mostly sockets) are needed."""

from __future__ import annotations

import resource

from .errors import ConfigError


def connections_of(threads: int) -> int:
    """Return the number of connections, including idle ones, that an HTTP server with `threads` accepts."""
    return 2 * threads


def descriptors_of(threads: int) -> int:
    """Return the number of files that an HTTP server with `threads` may have open.

    Three per request (client, its watch, upstream connection or a replacement), one per connection, and some
    in reserve.
    """
    return 3 * threads + connections_of(threads) + 256


def allow_open_files(needed: int, flag: str) -> None:
    """Raise the soft limit of this process and its children to at least `needed`.

    A server that runs out of descriptors in accept() fails under load, so check at the start.

    Raises:
        ConfigError: the hard limit is lower. The message names `flag`, the setting that requires the files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{flag} needs {needed} file descriptors but the limit is {hard}; "
            "raise it (ulimit -n, LimitNOFILE=) or choose a smaller number"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def open_files_limit() -> int:
    """Return the maximum of open files to which this process can raise its limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard
