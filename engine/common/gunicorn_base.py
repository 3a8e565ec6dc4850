"""gunicorn's base classes, imported without the environment variables that would change their behaviour.

gunicorn reads some variables when it is imported and fails with a stack trace if their values are not what
it expects (``WEB_CONCURRENCY=auto``). It reads SCRIPT_NAME at each request: every path without that prefix
fails. Container images and hosting platforms set them for other programs. Router and replica take their
settings from their command lines only, so import gunicorn's arbiter, application and logger from here.
"""

# ruff: noqa: E402 -- the variables must be removed before the import.
from __future__ import annotations

import os

for _name in ("WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "SCRIPT_NAME"):
    os.environ.pop(_name, None)

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.workers import base as worker_base
from gunicorn.workers.workertmp import WorkerTmp

__all__ = [
    "Arbiter",
    "BaseApplication",
    "HaltServer",
    "Logger",
    "WorkerTmp",
    "forget_inherited_sockets",
    "worker_base",
]

#: Variables of gunicorn's binary upgrade and of systemd's socket activation.
_SOCKETS = ("GUNICORN_PID", "GUNICORN_FD", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def forget_inherited_sockets() -> None:
    """Make the arbiter open its own sockets, even if a parent process left descriptions of others."""
    for name in _SOCKETS:
        os.environ.pop(name, None)
