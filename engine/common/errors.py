"""The errors that reach a person: each carries one line that says what, where, and what would be right."""

import errno

#: Errors of a disk that is full, read-only or broken at present.
_DISK_CONDITIONS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})


class FastDeployError(Exception):
    """Base of all of them. Entry points print `str(error)` and exit; they never print a stack trace."""


class ConfigError(FastDeployError):
    """A command line, a configuration file or a checkpoint's config.json is wrong."""


class CheckpointError(FastDeployError):
    """The weights of a checkpoint are missing, unreadable or of the wrong shape."""


class RequestError(FastDeployError):
    """A client's request is wrong (HTTP 400). `param` is the JSON field at fault, dotted."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ReplicaUnavailable(FastDeployError):
    """The replica cannot take this request now (HTTP 503): loading, full, draining or broken."""


def is_disk_condition(error: OSError) -> bool:
    """Return True if the cause is the state of a disk, rather than a wrong path or a missing permission."""
    return error.errno in _DISK_CONDITIONS


class EngineLost(ReplicaUnavailable):
    """The worker ended while it had this request (HTTP 503)."""
