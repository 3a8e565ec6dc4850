"""Exceptions whose message is shown to users: one line with what is wrong, where, and how to fix it."""

import errno

#: Errors of a disk that is full, read-only or failing.
_DISK_CONDITIONS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE})


class FastDeployError(Exception):
    """Base class. Entry points print `str(error)` and exit, without a stack trace."""


class ConfigError(FastDeployError):
    """A command line, a configuration file or a checkpoint's config.json is invalid."""


class CheckpointError(FastDeployError):
    """The weights of a checkpoint are missing, unreadable or of the wrong shape."""


class RequestError(FastDeployError):
    """A client's request is invalid (HTTP 400).

    Attributes:
        param: dotted path of the invalid JSON field.
        code: OpenAI's word for the error.
    """

    def __init__(self, message: str, param: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class GrammarFailed(FastDeployError):
    """A text cannot continue within its grammar and the other constraints of its request."""


class ReplicaUnavailable(FastDeployError):
    """The replica cannot accept this request now (HTTP 503): it is loading, draining or broken."""


class EngineLost(ReplicaUnavailable):
    """The worker ended while it processed this request (HTTP 503)."""


def is_disk_condition(error: OSError) -> bool:
    """Return True if the cause is the state of a disk, rather than a wrong path or a missing permission."""
    return error.errno in _DISK_CONDITIONS
